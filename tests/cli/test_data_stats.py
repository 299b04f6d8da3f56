"""`baichuan-omni data stats --config`: the shares of the loss that the sources of a run will have."""

from pathlib import Path

from baichuan_omni_jax.cli.main import main
from data_pipelines.tokenizers.tokenizer import train_tokenizer


def test_shares_of_the_loss_in_a_run(sample_root, tmp_path, capsys):
    """Text and speech of the sample data at equal weights of what is trainable: half the loss each."""
    sources = [{"name": name, "manifest": f"{name}.jsonl"} for name in ("text", "audio")]
    sets = [f"data.root={sample_root}", "data.sample=false", f"data.mixture={sources}", "train.audio_full_ratio=1"]
    config = str(Path(__file__).parents[2] / "configs" / "micro.py")
    sets = [part for each in (*sets, "data.weights_by=trainable") for part in ("--set", each)]
    assert main(["data", "stats", "--config", config, *sets]) == 0
    rows = {row[0]: row[1:] for row in map(str.split, capsys.readouterr().out.splitlines()) if row}
    assert (rows["text"][4], rows["text"][6]) == ("0.0", "50.0")
    assert (rows["audio"][4], rows["audio"][6]) == ("100.0", "50.0")
    # Counted by the tokenizer of the weights that the run starts from: here one of letters, so text has more tokens.
    parent = tmp_path / "parent"
    (parent / "processor").mkdir(parents=True)
    (parent / "branches.json").write_text('{"llm": {"parameters": 1, "dtype": "float32", "trained": 1}}')
    train_tokenizer(["a"], 320).save(str(parent / "processor" / "tokenizer.json"))
    sets += ["--set", f"checkpoint.init_from=llm={parent}", "--set", "data.budgets.tokens=1024"]
    assert main(["data", "stats", "--config", config, *sets]) == 0
    letters = {row[0]: row[1:] for row in map(str.split, capsys.readouterr().out.splitlines()) if row}
    assert float(letters["text"][0]) < 0.8 * float(rows["text"][0])
    assert main(["data", "stats", "--config", config, str(sample_root / "text.jsonl")]) == 2
    assert main(["data", "stats"]) == 2
