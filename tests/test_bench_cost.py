"""The roof's formulas against numbers worked by hand."""

import cost
import pytest

from reasoners.model import CONFIGS

# Per layer: q 2048^2, k and v 2 x 2048 x 512, out 2048^2, MLP 3 x 2048 x 8192 = 60,817,408.
LLAMA_1B = 16 * 60_817_408 + 128_256 * 2048
# Per layer: in_proj 2048 x (4 x 2048 + 32), out 2048^2, the same MLP = 71,368,704.
LLAMBA_1B = 16 * 71_368_704 + 128_256 * 2048


@pytest.fixture(autouse=True)
def on_an_h100(monkeypatch):
    monkeypatch.setattr(cost, "device", lambda: cost.H100)


def test_matrices():
    assert LLAMA_1B == 1_235_746_816  # 2.47 GB
    assert cost.decode_weight_bytes(CONFIGS["llama-3.2-1b"]) == 2 * LLAMA_1B
    assert cost.decode_weight_bytes(CONFIGS["llamba-1b"]) == 2 * LLAMBA_1B
    assert cost.decode_weight_bytes(CONFIGS["llamba-1b"], weight_bytes=1) == LLAMBA_1B
    # Untied: still one head of 128,256 x 4096, and no embedding.
    per_layer = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14_336
    assert cost.decode_weight_bytes(CONFIGS["llama-3.1-8b"]) == 2 * (
        32 * per_layer + 128_256 * 4096
    )


def test_paged_attention_with_a_prefix():
    """256 samples of a prompt of 512 tokens with 256 of their own, 8 kv heads of 64, in bf16."""
    q_and_y = 2 * 256 * 32 * 64 * 2
    cache = 2 * (512 + 256 * 256) * 8 * 64 * 2
    one, none = ([768] * 256, [1] * 256), ([], [])
    assert cost.paged_attention_bytes(*one, 32, 8, 64, 2, prefix=512) == cache + q_and_y
    assert cost.paged_attention_bytes(*one, 32, 8, 64, 2) == 2 * 768 * 256 * 1024 + q_and_y
    assert cost.paged_attention_bytes(*none, 32, 8, 64, 2, prefix=512) == 0


def test_selective_scan():
    # A million channels and tokens in bf16: x, y 2 B each and the step 4 B; 16 exponentials each.
    assert cost.selective_scan_bytes(500, 2000, 2) == 8_000_000
    assert cost.selective_scan_backward_bytes(500, 2000, 2) == 14_000_000
    assert cost.selective_scan_s(8_000_000, 500, 2000, 16) == 16e6 / (132 * 16 * 1.755e9)
    assert cost.selective_scan_s(8_000_000, 500, 2000, 1) == 8e6 / 3.03e12


def test_llamba_step():
    # Scan: 16 layers x 32 x 64 x 64 x 4 B, read and written = 16.8 MB. Convolution: 16 layers x (3
    # inputs read, 1 written) x (2048 + 2048 + 2048) channels x 2 B = 0.8 MB. Its length changes nothing.
    scan, conv = 16_777_216, 786_432
    config = CONFIGS["llamba-1b"]
    for batch in (1, 512):
        for length in (1, 1000):
            expected = 2 * LLAMBA_1B + batch * (scan + conv)
            assert cost.decode_step_bytes(config, batch, length) == expected
    assert cost.decode_step_bytes(config, 2, 1, state_bytes=2) == 2 * LLAMBA_1B + 2 * (
        scan // 2 + conv
    )


def test_llama_step():
    # K and V: 16 layers x 2 x 8 heads x 64 x 2 B = 32 KiB a token.
    config = CONFIGS["llama-3.2-1b"]
    assert cost.decode_step_bytes(config, 3, 100) == 2 * LLAMA_1B + 3 * 100 * 32_768


def test_hybrid_step():
    # 4 of 16 layers attend: 8 KiB a token. 12 scan 32 x 64 x 64, and convolve 512 + 512 + 2048.
    config = CONFIGS["mambainllama-1b-mamba2"]
    sequence = 2 * 12 * 131_072 * 4 + 12 * 4 * 3072 * 2 + 100 * 8192
    weights = cost.decode_weight_bytes(config)
    assert cost.decode_step_bytes(config, 5, 100) == weights + 5 * sequence


def test_roof():
    config = CONFIGS["llama-3.2-1b"]
    assert 1 / cost.roof_s(config, 1, 0) == pytest.approx(1226, abs=1)  # 2.47 GB at 3.03 TB/s
    # At batch 512 the products take longer than the weights: 1.27 TFLOP at 753 TFLOP/s = 1.68 ms.
    assert cost.decode_step_flops(config, 512) == 2 * 512 * LLAMA_1B
    assert cost.roof_s(config, 512, 0) == pytest.approx(1.6805e-3, rel=1e-4)
    # 512 sequences x 100 tokens x 32 KiB = 1.678 GB more = 0.554 ms.
    more = cost.roof_s(config, 512, 100) - cost.roof_s(config, 512, 0)
    assert more == pytest.approx(0.5537e-3, rel=1e-3)


def test_state_update_bytes():
    # One row of Llamba-1B: 2 x 524,288 B of state; x, y, B, C of 32 heads x 64 in bf16.
    assert cost.state_update_bytes(1, 32, 64, 64, data_bytes=2) == 2 * 524_288 + 4 * 32 * 64 * 2
    # x and B of 8 heads, y and C of 24.
    shared = cost.state_update_bytes(2, 24, 128, 128, 2, data_bytes=2, kv_heads=8)
    assert shared == 2 * (2 * 24 * 128 * 128 * 2 + (24 + 24 + 8 + 8) * 128 * 2)
    # Written every 8th token: of 7 recent ones half are read, of 8 tokens 7 are kept.
    late = cost.state_update_bytes(1, 32, 64, 64, data_bytes=2, period=8)
    recent = 2 * 32 * 64 * 2 + 2 * 32 * 4
    assert late == 524_288 * 9 / 8 + 4 * 32 * 64 * 2 + (3.5 + 7 / 8) * recent


def test_targets_keep_what_they_allow_beside_the_bytes(monkeypatch):
    assert cost.target_here_us(184, 500_000_000) == 184
    faster = cost.Device("of twice the rate", 2 * 3.03e12, 753e12)
    monkeypatch.setattr(cost, "device", lambda: faster)
    assert cost.target_here_us(184, 303_000_000) == pytest.approx(184 - 50)


def test_rotation():
    assert cost.rotation(1e6) == 200
    assert cost.rotation(1e9) == 2
