"""Did-you-mean."""

from megatron_llm.utils.suggest import did_you_mean, nearest


def test_nearest_ignores_case_and_dashes() -> None:
    names = ["hidden_size", "num_layers", "seq_length"]
    assert nearest("hiden-size", names) == "hidden_size"
    assert nearest("NUM-LAYERS", names) == "num_layers"
    assert nearest("zzz", names) is None
    assert nearest("x", []) is None


def test_end_of_a_sentence() -> None:
    assert did_you_mean("lama", ["llama", "gpt"]) == "; did you mean 'llama'?"
    assert did_you_mean("zzz", ["llama", "gpt"]) == ""
