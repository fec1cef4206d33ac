"""LoRA adapters of every linear layer and of all experts, for every family, against PEFT's merge_and_unload."""

import pytest

from tests.support.families import FAMILIES, WRAPPERS
from tests.support.meshes import mesh_of

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

torch = pytest.importorskip("torch", reason="live parity needs torch, transformers and peft")
peft = pytest.importorskip("peft", reason="live parity needs torch, transformers and peft")

import jaxmoe  # noqa: E402
from scripts.make_goldens import make_model, save_forms  # noqa: E402
from tests.support.adapters import check_equal, params  # noqa: E402

# Modules that PEFT puts no adapter on: Mamba's kernels read their weights without calling them.
PEFT_REFUSES = {"nemotron_h": ("out_proj",)}
# PEFT adapts all that is called experts: also zero experts, and experts of images. Such adapters are refused.
REFUSED = {"longcat_flash": "by the rule 'zero experts'", "ernie4_5_vl_moe": "vision_moe"}


@pytest.mark.parametrize("family", [*FAMILIES, *WRAPPERS])
def test_merging_equals_pefts(family, tmp_path):
    model = make_model(family, seed=7)
    save_forms(model, tmp_path / "base")
    # Of a multimodal model only the text part has an adapter that means something here.
    text = "language_model." if family in WRAPPERS else ""
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and text in name]
    fused = {
        ".".join(name.split(".")[-2:]) for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3
    }
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        init_lora_weights=False,
        target_modules=[name for name in linears if not name.endswith(("lm_head", *PEFT_REFUSES.get(family, ())))],
        target_parameters=sorted(fused) or None,
    )
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    save_forms(adapted.merge_and_unload(), tmp_path / "merged")
    mesh = mesh_of(1, 1, 1)
    if family in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[family]):
            jaxmoe.load(tmp_path / "base" / "original", mesh=mesh, adapter=tmp_path / "adapter")
        return
    expected = params(jaxmoe.load(tmp_path / "merged" / "original", mesh=mesh))
    for form in sorted(path.name for path in (tmp_path / "base").iterdir()):
        loaded = jaxmoe.load(tmp_path / "base" / form, mesh=mesh, adapter=tmp_path / "adapter")
        check_equal(params(loaded), expected)
    with pytest.raises(AssertionError):
        check_equal(params(jaxmoe.load(tmp_path / "base" / "original", mesh=mesh)), expected)
