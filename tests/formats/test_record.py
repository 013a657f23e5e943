"""What rankwise.json says of each site."""

import json

import pytest

from rankwise.adapters.scaling import effective_scale
from rankwise.surgery.bank import Bank
from tests.grid import spec, trained
from tests.models import tiny

KINDS = {
    "lora": {},
    "rslora": {"scaling": "alpha/sqrt(r)"},
    "direct": {"scaling": "alpha", "alpha": 2},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora", "scaling": "alpha/sqrt(r)"},
    "adalora": {"form": "adalora"},
}


@pytest.mark.parametrize("name", KINDS)
def test_rank_alpha_and_scale_of_a_site_agree(name, tmp_path):
    with Bank(tiny("llama")) as bank:
        trained(bank, "a", spec("minimal", **KINDS[name]))
        bank.save("a", tmp_path)
    record = json.loads((tmp_path / "rankwise.json").read_text())
    for site in record["sites"].values():
        said = effective_scale(record["spec"]["scaling"], site["alpha"], site["rank"])
        assert said == pytest.approx(site["scale"], rel=1e-12)
