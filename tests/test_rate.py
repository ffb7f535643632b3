"""The rates that a training is compared with, and which hardware multiplies bfloat16."""

import pytest
import torch

import train
from engine import memory, rate, settings


@pytest.mark.parametrize("name, teraflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835),
    ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("A100-PCIE-40GB", 312),
    ("NVIDIA L40S", 362), ("NVIDIA GeForce RTX 4090", 165)])  # fmt: skip
def test_the_data_sheets_rate_is_that_of_this_very_card(name, teraflops):
    assert rate.peak_rate(name, torch.bfloat16) == teraflops * 1e12
    assert rate.peak_rate(name, torch.float32) is None


@pytest.mark.parametrize("name", [
    "", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A10G",
    "NVIDIA L40"])  # fmt: skip
def test_no_share_of_a_data_sheet_is_said_of_another_card(name):
    assert rate.peak_rate(name, torch.bfloat16) is None


def test_a_cpu_has_the_measured_rate_alone():
    found = rate.rates("cpu", torch.float32)
    assert set(found) == {"mfu"} and found["mfu"] > 1e8


@pytest.mark.parametrize("capability, fast", [
    ((7, 0), False), ((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True)])  # fmt: skip
def test_v100_and_t4_train_in_float32_and_say_so(capability, fast, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(memory, "available_memory", lambda device: 16 * memory.GB)
    cfg = train.resolve({"device": "cuda"}, 1)
    assert cfg.bf16 == fast
    said = settings.overview(cfg, train.choose_precision(cfg))
    assert ("cuda multiplies bf16 slowly" in said) != fast
