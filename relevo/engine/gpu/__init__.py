"""What an engine does on a GPU alone: its memory, CUDA graphs, blocks to and from the host."""
