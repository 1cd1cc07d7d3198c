"""The list of what is not trained on, over a resume."""

from __future__ import annotations

import json

from diffsynth.diffusion.bad_items import ExcludedList


def test_a_line_that_a_kill_cut_short_does_not_keep_a_run_from_going_on(tmp_path):
    whole = json.dumps({"row": 3, "reason": "gone", "found": "step 4"})
    before = json.dumps({"row": 1, "reason": "damaged", "found": "before training"})
    (tmp_path / "excluded.jsonl").write_text(f'{before}\n{whole}\n{{"row": 5, "rea', encoding="utf-8")
    ExcludedList(tmp_path, dataset=object()).start(resumed=True)
    assert (tmp_path / "excluded.jsonl").read_text(encoding="utf-8") == whole + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["excluded.jsonl"]
