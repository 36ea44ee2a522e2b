"""The op against the published formulas in numpy, float64 differences, and the plain form."""

import io

import numpy as np
import pytest
import torch

from mmbcn.ops import standardize_weight
from mmbcn.ops.weight_standardization import standardize_weight_reference

VARIANTS = {  # eps_inside, unbiased -> the divisor of a filter of n weights
    (True, True): lambda filt, eps: np.sqrt(filt.var(ddof=1) + eps),
    (False, True): lambda filt, eps: filt.std(ddof=1) + eps,
    (True, False): lambda filt, eps: np.sqrt(filt.var() + eps),
    (False, False): lambda filt, eps: filt.std() + eps,
}
SHAPES = [(6, 3, 3, 3), (5, 63, 1, 1), (4, 1, 3, 3), (3, 2, 1, 5), (2, 2), (3, 2, 5), (0, 4, 3, 3)]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def oracle(weight, eps, variant):
    weight = weight.detach().double().numpy()
    out = np.empty_like(weight)
    for i, filt in enumerate(weight):
        out[i] = (filt - filt.mean()) / VARIANTS[variant](filt, eps)
    return torch.from_numpy(out)


@variants
@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_numpy(shape, eps, variant):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64) * 2 + 0.3
    expected = oracle(weight, eps, variant)
    for form in (standardize_weight, standardize_weight_reference):
        torch.testing.assert_close(form(weight, eps, *variant), expected, rtol=1e-12, atol=1e-12)


@variants
@pytest.mark.parametrize("shape", [(3, 2, 2, 3), (2, 1, 2, 2), (2, 5, 1, 1)], ids=str)
def test_first_and_second_derivatives(shape, variant):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64) + 0.3
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = weight.contiguous(memory_format=layout).requires_grad_()

        def op(w):
            return standardize_weight(w, 1e-2, *variant)

        assert torch.autograd.gradcheck(op, leaf, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(op, leaf)


@variants
def test_gradient_of_constant_filters(variant):
    """The limit: only the centring and the constant are left of the Jacobian."""
    eps = 1e-2
    weight = torch.full((2, 3, 3, 3), 0.1, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    y = standardize_weight(weight, eps, *variant)
    y.backward(dy)
    divisor = eps**0.5 if variant[0] else eps
    expected = (dy - dy.mean((1, 2, 3), keepdim=True)) / divisor
    torch.testing.assert_close(y, torch.zeros_like(y), rtol=0, atol=1e-12)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-9, atol=1e-9)


@variants
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_constant_filters_stay_finite_in_float32(value, variant):
    weight = torch.full((2, 3, 3, 3), value, requires_grad=True)
    y = standardize_weight(weight, 1e-5, *variant)
    y.backward(torch.randn(2, 3, 3, 3))
    assert y.isfinite().all()
    assert weight.grad.isfinite().all()


@variants
@pytest.mark.parametrize("offset", [0.0, 33.0, 1e4])
def test_large_means_cost_no_digits(offset, variant):
    torch.manual_seed(0)
    weight, dy = torch.randn(16, 7, 5, 3) + offset, torch.randn(16, 7, 5, 3)

    def run(form, dtype):
        leaf = weight.to(dtype).requires_grad_()
        y = form(leaf, 1e-5, *variant)
        y.backward(dy.to(dtype))
        return y.detach().double(), leaf.grad.double()

    truth = run(standardize_weight_reference, torch.float64)
    torch.testing.assert_close(truth[0], oracle(weight, 1e-5, variant), rtol=1e-9, atol=1e-9)
    ours = run(standardize_weight, torch.float32)
    for value, true in zip(ours, truth, strict=True):
        assert (value - true).norm() < 3e-7 * true.norm()


@variants
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_have_float32_statistics(dtype, variant):
    torch.manual_seed(0)
    weight = (torch.randn(4, 63, 3, 3) * 0.02 + 0.1).to(dtype).requires_grad_()
    dy = torch.randn(4, 63, 3, 3).to(dtype)
    y = standardize_weight(weight, 1e-5, *variant)
    y.backward(dy)
    assert y.dtype == weight.grad.dtype == dtype
    one_rounding = torch.finfo(dtype).eps
    expected = oracle(weight, 1e-5, variant)
    torch.testing.assert_close(y.double(), expected, rtol=one_rounding, atol=1e-6)
    exact = weight.detach().double().requires_grad_()
    standardize_weight_reference(exact, 1e-5, *variant).backward(dy.double())
    scale = exact.grad.abs().max().item()
    torch.testing.assert_close(
        weight.grad.double(), exact.grad, rtol=one_rounding, atol=1e-6 * scale
    )


@variants
def test_keeps_the_memory_format(variant):
    weight = torch.randn(6, 5, 3, 2).contiguous(memory_format=torch.channels_last)
    leaf = weight.clone().requires_grad_()
    y = standardize_weight(leaf, 1e-5, *variant)
    y.backward(torch.ones_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert leaf.grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), oracle(weight, 1e-5, variant), rtol=1e-5, atol=1e-5)
    scattered = torch.randn(3, 2, 5, 6).permute(3, 2, 0, 1)
    y = standardize_weight(scattered, 1e-5, *variant)
    torch.testing.assert_close(y.double(), oracle(scattered, 1e-5, variant), rtol=1e-5, atol=1e-5)


@variants
def test_function_transforms(variant):
    torch.manual_seed(0)
    weights = torch.randn(3, 4, 2, 2, 3, dtype=torch.float64)

    def loss(form):
        return lambda w: form(w, 1e-2, *variant).pow(3).sum()

    for transform in (torch.func.grad, torch.func.hessian):
        ours = torch.func.vmap(transform(loss(standardize_weight)))(weights)
        theirs = [transform(loss(standardize_weight_reference))(w) for w in weights]
        torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-9, atol=1e-9)


@variants
def test_backward_keeps_the_output_and_the_weights_only(variant):
    weight = torch.randn(64, 32, 3, 3, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = standardize_weight(weight, 1e-5, *variant)
    for shared in (weight, y):  # the parameter, and what the convolution keeps
        kept.pop(shared.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) <= 2 * 64 * 4  # a few numbers per filter


@variants
def test_compiles_in_one_graph(variant):
    torch.manual_seed(0)
    weight, dy = torch.randn(2, 6, 5, 3, 3)
    torch._dynamo.reset()
    compiled = torch.compile(standardize_weight, fullgraph=True, backend="aot_eager")
    leaves = [weight.clone().requires_grad_() for _ in range(2)]
    for leaf, form in zip(leaves, (compiled, standardize_weight), strict=True):
        y = form(leaf, 1e-5, *variant)
        y.backward(dy)
        torch.testing.assert_close(y.double(), oracle(weight, 1e-5, variant), rtol=0, atol=1e-5)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_in_a_saved_trace_and_in_a_script():
    weight = torch.randn(6, 5, 3, 3)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(standardize_weight, weight), buffer)
    buffer.seek(0)
    for form in (torch.jit.load(buffer), torch.jit.script(standardize_weight)):
        other = torch.randn(6, 5, 3, 3)
        torch.testing.assert_close(form(other), standardize_weight(other), rtol=1e-5, atol=1e-5)


def test_shapes_without_values():
    weight = torch.randn(6, 5, 3, 3, device="meta", requires_grad=True)
    standardize_weight(weight).sum().backward()
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("shape", [(4, 1, 1, 1), (4, 1), (4,), ()], ids=str)
def test_single_weights_are_refused(shape):
    with pytest.raises(ValueError, match=r"at least 2 weights.*got shape"):
        standardize_weight(torch.randn(shape))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@variants
def test_on_cuda(variant):
    torch.manual_seed(0)
    weight, dy = torch.randn(2, 64, 63, 3, 3)
    leaves = [(weight + 10).to(d).requires_grad_() for d in ("cuda", "cpu")]
    for leaf in leaves:
        y = standardize_weight(leaf, 1e-5, *variant)
        y.backward(dy.to(leaf.device))
        torch.testing.assert_close(
            y.cpu().double(), oracle(leaf.cpu(), 1e-5, variant), atol=1e-5, rtol=0
        )
    torch.testing.assert_close(leaves[0].grad.cpu(), leaves[1].grad, rtol=1e-4, atol=1e-5)
