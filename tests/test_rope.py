"""RoPE in both pairings, YaRN, and the Hadamard and fp8 steps of the indexer."""

import dataclasses

import pytest
import torch

from sparse_attn import DSAConfig, YaRN
from sparse_attn.indexer import hadamard_transform, simulate_fp8
from sparse_attn.rope import apply_rope, rope_cos_sin

V32 = DSAConfig.deepseek_v32()


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_rope_turns_pairs_like_complex_numbers(pairing):
    config = dataclasses.replace(V32, rope_scaling=None)
    positions = torch.tensor([0, 1, 7, 100000])
    x = torch.randn(4, 3, 80)
    cos, sin = rope_cos_sin(positions, 64, config)
    turned = apply_rope(x, cos, sin, pairing)
    angle = positions[:, None].float() * 10000.0 ** (-torch.arange(32) / 32)
    first, second = (x[..., :32], x[..., 32:64]) if pairing == "half" else (x[..., 0:64:2], x[..., 1:64:2])
    z = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)[:, None]
    parts = torch.view_as_real(z)  # [tokens, heads, 32, 2]
    expected = (parts.mT if pairing == "half" else parts).flatten(-2)
    torch.testing.assert_close(
        turned[..., :64], expected, rtol=1e-3, atol=2e-2 if positions.max() > 1e4 else 1e-5
    )
    torch.testing.assert_close(turned[:3, :, :64], expected[:3], rtol=1e-5, atol=1e-5)
    assert torch.equal(turned[..., 64:], x[..., 64:])
    assert torch.equal(turned[0], x[0])


def test_the_pairings_differ():
    cos, sin = rope_cos_sin(torch.arange(4), 64, V32)
    x = torch.randn(4, 1, 64)
    assert not torch.allclose(apply_rope(x, cos, sin, "half"), apply_rope(x, cos, sin, "interleaved"))
    with pytest.raises(ValueError, match="pairing: expected 'interleaved' or 'half', got 'neox'"):
        apply_rope(x, cos, sin, "neox")


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_scores_depend_on_distance_only(pairing):
    q, k = torch.randn(2, 64)
    config = dataclasses.replace(V32, rope_scaling=None)

    def score(i, j):
        cos, sin = rope_cos_sin(torch.tensor([i, j]), 64, config)
        turned = apply_rope(torch.stack([q, k])[:, None], cos, sin, pairing)[:, 0]
        return turned[0] @ turned[1]

    torch.testing.assert_close(score(10, 3), score(110, 103), rtol=1e-4, atol=1e-4)


def test_yarn_matches_transformers():
    """Frequencies and scale of an independent implementation."""
    utils = pytest.importorskip(
        "transformers.modeling_rope_utils", reason="transformers is in the demo extra"
    )
    from transformers import DeepseekV3Config

    parameters = {
        **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
        **{"beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096},
    }
    theirs = DeepseekV3Config(rope_parameters=parameters, max_position_embeddings=163840)
    frequencies, scale = utils.ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    ours = dataclasses.replace(V32, rope_scaling=YaRN.from_dict(parameters))
    cos, sin = rope_cos_sin(torch.tensor([1]), 64, ours)
    torch.testing.assert_close(cos[0] / scale, frequencies.cos())
    torch.testing.assert_close(sin[0] / scale, frequencies.sin())


def test_yarn_stretches_slow_dimensions_only():
    plain = dataclasses.replace(V32, rope_scaling=None)
    (_, sin), (_, stretched) = (rope_cos_sin(torch.tensor([1]), 64, c) for c in (plain, V32))
    assert torch.equal(sin[0, :8], stretched[0, :8])
    torch.testing.assert_close(sin[0, -4:] / stretched[0, -4:], torch.full((4,), 40.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("d", [1, 2, 64, 128])
def test_hadamard_is_the_orthonormal_sylvester_matrix(d):
    matrix = torch.ones(1, 1)
    while len(matrix) < d:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    x = torch.randn(5, d)
    torch.testing.assert_close(hadamard_transform(x), x @ matrix * d**-0.5)
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x)), x)
    with pytest.raises(ValueError, match="power of two as last dimension, got 3"):
        hadamard_transform(torch.randn(3))


def test_fp8_simulation_rounds_to_e4m3_under_a_power_of_two():
    x = torch.tensor([[1.0, -0.3, 447.0, 100.3], [1e-6, 0.0, 0.0, 0.0], [900.0, 3.3, 0.0, -1.0]])
    rounded = simulate_fp8(x)
    scales = [1.0, 2.0**-22, 4.0]  # 2 ** ceil(log2(max(amax, 1e-4) / 448))
    for row, expected, scale in zip(rounded, x, scales, strict=True):
        assert torch.equal(row, (expected / scale).to(torch.float8_e4m3fn).float() * scale)
    assert simulate_fp8(x.bfloat16()).dtype == torch.bfloat16
