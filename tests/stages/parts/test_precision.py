import pytest
import torch

from warpline.stages.parts.precision import autocast, choose_precision, has_fast_bf16

CPU = torch.device("cpu")


def test_auto_follows_the_hardware_and_names_are_obeyed():
    assert choose_precision("auto", CPU) == ("bf16" if has_fast_bf16(CPU) else "fp32")
    assert choose_precision("bf16", CPU) == "bf16"
    assert choose_precision("fp32", CPU) == "fp32"


def test_fast_bf16_means_dot_product_instructions():
    capabilities = torch.cpu.get_capabilities()
    assert has_fast_bf16(CPU) == bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    assert has_fast_bf16(torch.device("cuda"))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_products_run_in_the_chosen_format(precision, dtype):
    with autocast(precision, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
