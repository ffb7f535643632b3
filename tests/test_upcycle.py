"""Dense to sparse: nothing is lost at step 0, everything can be learned after it."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tiny import question, tiny_cumo

from cumo import CuMo
from upcycle import PARTS, main, upcycle

ROOT = Path(__file__).parents[1]
TOKENS = torch.tensor([question(1, 5, "i", 7, 8, 9)])
IMAGE = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("parts", [("clip",), ("mlp",), ("llm",), ("clip", "mlp"), PARTS])
@pytest.mark.parametrize("num_experts, top_k", [(4, 2), (8, 2), (3, 1)])
def test_upcycled_equals_dense_at_step_0(parts, num_experts, top_k):
    dense = tiny_cumo(scales=(1, 2)).eval()
    for seed in (0, 1):  # for any router
        sparse = upcycle(dense, parts, num_experts, top_k, seed).eval()
        torch.testing.assert_close(
            sparse(TOKENS, IMAGE).logits, dense(TOKENS, IMAGE).logits, rtol=1e-4, atol=1e-5
        )


def test_experts_are_exact_copies_and_grow_apart_with_training():
    sparse = upcycle(tiny_cumo())
    w1 = sparse.vision.layers[0].moe.experts.w1
    assert all(torch.equal(w1[0], w1[e]) for e in range(4))
    sparse(TOKENS, IMAGE, TOKENS.clamp(min=0)).loss.backward()
    torch.optim.SGD(sparse.parameters(), lr=1.0).step()
    assert not torch.equal(w1[0], w1[1])


def test_the_dense_model_is_left_alone_and_seeds_draw_the_routers():
    dense = tiny_cumo()
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    routers = [upcycle(dense, seed=s).connector.moe.gate.weight for s in (0, 0, 1)]
    assert torch.equal(routers[0], routers[1]) and not torch.equal(routers[0], routers[2])
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())


def test_scratch_keeps_everything_but_the_experts():
    dense = tiny_cumo().eval()
    scratch = upcycle(dense, scratch=("clip", "mlp")).eval()
    assert torch.equal(
        scratch.vision.layers[0].self_attn.q_proj.weight,
        dense.vision.layers[0].self_attn.q_proj.weight,
    )
    assert not torch.allclose(scratch(TOKENS, IMAGE).logits, dense(TOKENS, IMAGE).logits, atol=1e-3)


def test_scratch_is_for_the_parts_that_it_names_and_leaves_the_routers_as_they_are():
    dense, copies = tiny_cumo(), upcycle(tiny_cumo())
    one = upcycle(dense, scratch=("clip",))
    assert torch.equal(one.connector.moe.experts.w1, copies.connector.moe.experts.w1)
    for layer, other in zip(one.vision.layers, copies.vision.layers):
        assert not torch.equal(layer.moe.experts.w1, other.moe.experts.w1)
        assert torch.equal(layer.moe.gate.weight, other.moe.gate.weight)
    assert torch.equal(one.connector.moe.gate.weight, copies.connector.moe.gate.weight)


def test_a_mixtral_keeps_its_own_experts():
    dense = tiny_cumo(llm_experts=4).eval()
    sparse = upcycle(dense).eval()
    expected = dense(TOKENS, IMAGE).logits
    torch.testing.assert_close(sparse(TOKENS, IMAGE).logits, expected, rtol=1e-4, atol=1e-5)


def test_impossible_requests_are_refused():
    dense = tiny_cumo()
    with pytest.raises(ValueError, match="choose from clip, mlp, llm"):
        upcycle(dense, ("clpi",))
    with pytest.raises(ValueError, match="clip, mlp is sparse already"):
        upcycle(upcycle(dense))
    with pytest.raises(ValueError, match="scratch 'llm': choose from clip, mlp"):
        upcycle(dense, scratch=("llm",))
    with pytest.raises(ValueError, match="top_k=5"):
        upcycle(dense, num_experts=4, top_k=5)


def test_command_writes_a_checkpoint_and_refuses_to_overwrite(tmp_path, monkeypatch):
    dense = tiny_cumo().eval()
    dense.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tekken.json").write_text("a tokenizer")
    flags = [str(tmp_path / "dense"), str(tmp_path / "sparse"), "--parts", "clip,mlp"]
    monkeypatch.setattr(sys, "argv", ["upcycle.py", *flags])
    main()
    sparse = CuMo.from_pretrained(tmp_path / "sparse").eval()
    torch.testing.assert_close(
        sparse(TOKENS, IMAGE).logits, dense(TOKENS, IMAGE).logits, rtol=1e-4, atol=1e-5
    )
    assert (tmp_path / "sparse" / "tekken.json").read_text() == "a tokenizer"
    with pytest.raises(ValueError, match="exists already"):
        main()
    flags = [str(tmp_path / "dense" / "model.safetensors"), str(tmp_path / "other")]
    monkeypatch.setattr(sys, "argv", ["upcycle.py", *flags])
    with pytest.raises(ValueError, match="is a file; name its directory, .*dense"):
        main()  # without a tokenizer, nothing could use the result
    assert not (tmp_path / "other").exists()


def test_a_second_command_into_the_same_folder_is_refused_and_harms_nothing(tmp_path, monkeypatch):
    tiny_cumo().save_pretrained(tmp_path / "dense")
    load = CuMo.from_pretrained

    def meanwhile(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CuMo, "from_pretrained", load)
            main()
        return load(*args)

    flags = [str(tmp_path / "dense"), str(tmp_path / "sparse")]
    monkeypatch.setattr(sys, "argv", ["upcycle.py", *flags])
    monkeypatch.setattr(CuMo, "from_pretrained", meanwhile)
    with pytest.raises(ValueError, match="sparse exists already; name a new directory"):
        main()
    assert load(tmp_path / "sparse").cfg.mlp_experts == 4


def test_a_full_disk_leaves_no_half_of_a_checkpoint(tmp_path, monkeypatch):
    tiny_cumo().save_pretrained(tmp_path / "dense")

    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("data.weights.save_file", full)
    flags = [str(tmp_path / "dense"), str(tmp_path / "sparse")]
    monkeypatch.setattr(sys, "argv", ["upcycle.py", *flags])
    with pytest.raises(OSError, match="cannot be written .*is the disk full?"):
        main()
    assert [f.name for f in tmp_path.iterdir()] == ["dense"]
