"""The KV transfer agent: one a host, a bounded store of sealed, immutable, named KV blocks in shared memory."""
