"""Model cards: scores also stand in the front matter, where the Hub looks for them."""

import json
import shutil

from huggingface_hub import ModelCard

from ddt_fast.model.card import write_model_card
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT


def test_scores_against_a_named_reference_are_in_the_front_matter(tmp_path):
    folder = shutil.copytree(EMBEDDED_CHECKPOINT, tmp_path / "model")
    assert "model-index" not in write_model_card(folder).read_text()
    scores = {"metrics": {"fid": 2.5, "inception_score": {"mean": 3}}, "reference": {"source": "/data/ref.npz"}}
    (folder / "metrics.json").write_text(json.dumps(scores))
    card = ModelCard.load(write_model_card(folder, license="mit"))
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("fid", 2.5, "ref.npz")
    assert card.data.license == "mit"
    assert "# DDT, 3 + 1 blocks of width 64\n" in card.text
    assert "/data" not in card.content
