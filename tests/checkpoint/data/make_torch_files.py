"""Write the ``.bin`` and ``.pt`` goldens beside this file with torch; the tests that read them need none.

Values count up, so that a test knows them: see GOLDENS in ``test_torch_zip.py``.
"""

from collections import OrderedDict
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def count(*shape: int, dtype: torch.dtype = torch.float32, start: int = 0) -> torch.Tensor:
    numel = torch.Size(shape).numel()
    return torch.arange(start, start + numel).reshape(shape).to(dtype)


def main() -> None:
    """Write every file."""
    dtypes = (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 complex64 "
        "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"
    )
    state = {name: count(2, 3, dtype=getattr(torch, name)) for name in dtypes.split()}
    state["bool"] = count(2, 3) > 2
    torch.save(state, HERE / "torch_dtypes.bin")

    base = count(4, 6)
    views = OrderedDict(
        whole=base,
        tied=base,
        rows=base[1:3],
        row=base[2],
        scalar=torch.tensor(7.0),
        empty=torch.zeros(0, 3),
        parameter=torch.nn.Parameter(count(2, start=5)),
        one_row=count(1, 3).T,
    )
    torch.save(views, HERE / "torch_views.bin")
    torch.save({"transposed": base.T, "permuted": count(2, 3, 4).permute(2, 0, 1)}, HERE / "torch_permuted.bin")
    torch.save({"columns": base[:, 1:3]}, HERE / "torch_columns.bin")
    torch.save({"plain": base}, HERE / "torch_legacy.bin", _use_new_zipfile_serialization=False)

    layer = torch.nn.Linear(3, 2)  # its state dict carries _metadata, which the pickle sets with BUILD
    with torch.no_grad():
        layer.weight.copy_(count(2, 3))
        layer.bias.copy_(count(2, start=6))
    optimizer = {"state": {0: {"exp_avg": count(2)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}]}
    training = {"state_dict": layer.state_dict(), "optimizer": optimizer, "epoch": 3, "name": "tiny", "best": None}
    torch.save(training, HERE / "torch_training.pt")

    # As SGLang's recorder of expert distribution dumps it: 3 passes, 2 layers, 4 tokens, 2 choices of 5 physical experts.
    records = [
        {"forward_pass_id": number, "rank": 0, "gatherer_key": "primary", "extend_seq_lens": [4], "positions": None}
        | {"topk_ids_of_layer": (count(2, 4, 2, dtype=torch.int32) + number) % 5}
        for number in range(3)
    ]
    torch.save(
        {"records": records, "last_physical_to_logical_map": torch.tensor([[0, 1, 2, 3, 0], [3, 2, 1, 0, 1]])},
        HERE / "torch_recorder.pt",
    )


if __name__ == "__main__":
    main()
