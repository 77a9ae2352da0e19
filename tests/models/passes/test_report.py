from __future__ import annotations

from relevo.models.passes.report import LeftAlone, PassRecord, grouped


def test_numbers_of_like_names_become_ranges() -> None:
    names = ["layers.0.mlp", "layers.2.mlp", "layers.1.mlp", "layers.5.mlp", "layers.0.attn.q", "norm", ""]
    assert grouped(names) == ["layers.0–2,5.mlp", "layers.0.attn.q", "norm", ""]


def test_numbers_inside_of_words_are_no_numbers() -> None:
    assert grouped(["h.0.fc1", "h.1.fc1", "h.0.fc2"]) == ["h.0–1.fc1", "h.0.fc2"]


def test_only_the_first_number_is_taken_together() -> None:
    assert grouped(["layers.0.experts.3.w1", "layers.1.experts.3.w1"]) == ["layers.0–1.experts.3.w1"]


def test_a_reason_is_given_once() -> None:
    record = PassRecord("p", "does")
    record.left_alone += [LeftAlone("a", "x", "1"), LeftAlone("b", "y"), LeftAlone("c", "x", "2")]
    assert record.reasons() == [("x", ["a", "c"]), ("y", ["b"])]
