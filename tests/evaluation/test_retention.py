"""The retention table: scores after each stage, differences to the stage before, chance; on made-up numbers."""

import json

from baichuan_omni_jax.evaluation.retention import StageAbilities, read_stage, write_retention


def score(name, value, chance, beyond, **more):
    return {name: value, "chance": chance, "items": 10, "beyond_chance": beyond} | more


STAGES = [
    StageAbilities("first", 12, {"image_qa": score("accuracy", 0.5, 0.3, True, media_gain=0.25)}),
    StageAbilities(
        "second",
        9,
        {"image_qa": score("accuracy", 0.45, 0.3, True), "asr": score("cer", 0.9, 0.85, False)},
    ),
    StageAbilities("third", 8, {"asr": score("cer", 0.4, 0.85, True)}),
]


def test_the_table_has_a_row_an_ability_and_a_column_a_stage(tmp_path):
    table = write_retention(tmp_path, STAGES)
    assert (tmp_path / "retention.md").read_text() == table + "\n"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line]
    assert rows[0] == ["", "chance", "first", "second", "third"]
    assert rows[2] == ["image_qa, accuracy", "30 %", "50 *", "45 (-5) *", "–"]
    assert rows[3] == ["asr, cer", "85 %", "–", "90", "40 (-50) *"]


def test_the_numbers_are_beside_it(tmp_path):
    write_retention(tmp_path, STAGES)
    found = json.loads((tmp_path / "retention.json").read_text())
    assert found["stages"] == ["first", "second", "third"]
    first, second = found["abilities"]["image_qa"]
    assert (first["accuracy"], first["difference"], first["media_gain"], first["step"]) == (0.5, None, 0.25, 12)
    assert abs(second["difference"] + 0.05) < 1e-9
    assert [row["stage"] for row in found["abilities"]["asr"]] == ["second", "third"]


def test_a_stage_is_read_at_its_last_measured_step(tmp_path):
    steps = {"9": {"a": score("accuracy", 0.1, 0.0, False)}, "12": {"a": score("accuracy", 0.2, 0.0, True)}}
    (tmp_path / "abilities.json").write_text(json.dumps({"steps": steps}))
    assert read_stage("s", tmp_path) == StageAbilities("s", 12, steps["12"])
    assert read_stage("s", tmp_path / "nowhere") is None
    for odd in ('{"steps": {}}', '{"steps": [3, 1]}', '{"steps": {"3": 5}}', "[" * 50000, "[]", '{"steps": {"²": {}}}'):
        (tmp_path / "abilities.json").write_text(odd)
        assert read_stage("s", tmp_path) is None


def test_scores_that_are_none_are_left_out_of_the_table(tmp_path):
    whole = score("accuracy", 0.1, 0.0, False)
    odd = [5, {}, whole | {"accuracy": "much"}, whole | {"chance": None}, whole | {"beyond_chance": 1}]
    scores = {"good": whole} | {f"odd {n}": entry for n, entry in enumerate([*odd, whole | {"media_gain": []}])}
    (tmp_path / "abilities.json").write_text(json.dumps({"steps": {"3": scores}}))
    found = read_stage("s", tmp_path)
    assert found == StageAbilities("s", 3, {"good": whole})
    write_retention(tmp_path, [found])
