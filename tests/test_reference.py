"""The float64 reference against the recipe book's check values, torch's own operators, and plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import reference as ref

WIDTH, HEADS, LAYERS, HIDDEN, VOCAB, PADDED, T = 64, 4, 6, 96, 61, 64, 24
HEAD_WIDTH = WIDTH // HEADS
STILL = torch.zeros(HEAD_WIDTH // 2, dtype=torch.float64)  # no rotation

def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def float64(values):
    return torch.tensor(values, dtype=torch.float64)

def make_params(**switches):
    """Random parameters of a small model, all techniques visibly on."""
    shapes = ref.parameter_shapes(LAYERS, WIDTH, HEADS, HIDDEN, PADDED, **switches)
    params = {name: normal(*shape, seed=i) * 0.3 for i, (name, shape) in enumerate(shapes.items())}
    params["lam"] += 1
    params["skip"] += 1
    return params

def make_net(**changes):
    defaults = dict(vocab_size=VOCAB, windows=ref.layer_windows(LAYERS, 5, T), order=ref.layer_order(LAYERS),
                    frequencies=ref.rope_frequencies(HEAD_WIDTH))
    return ref.Net(**(defaults | changes))

def make_tokens(batch=2, length=T, seed=0):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


# ---- Model -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    ("sizes", "switches", "count"),
    [
        ((30, 1792, 14, 4864), {}, 1_443_722_775),
        ((30, 2048, 16, 5632), {}, 1_870_172_811),
        ((16, 1024, 8, 2816), dict(iha=False, mtp=False, xsa=True), 316_935_848),
        ((30, 1792, 14, 4864), dict(iha=False), 1_443_704_547),
        ((30, 1792, 14, 4864), dict(iha=False, mtp=False), 1_398_287_931),
        ((30, 1792, 14, 4864), dict(iha=False, mtp=False, head_gate=False), 1_398_282_891),
    ],
)
def test_parameter_shapes_add_up_to_the_published_counts(sizes, switches, count):
    shapes = ref.parameter_shapes(*sizes, 50304, **switches)
    assert sum(math.prod(shape) for shape in shapes.values()) == count

def test_orders_and_windows_of_the_limited_track():
    order = ref.layer_order(30, (15, 20, 3))
    assert order[:15] == tuple(range(15))
    assert order[15:33] == (15, 16, 17, 18, 19, 20) * 3
    assert order[33:] == tuple(range(21, 30))
    full = [i for i, window in enumerate(ref.layer_windows(30, 1024, 2048)) if window == 2048]
    assert full == [3, 7, 11, 15, 19, 23, 27, 29]

def test_rms_is_torchs_with_the_float32_epsilon():
    x = normal(3, 5, WIDTH) * float64([1e-5, 1e-3, 10])[:, None, None]
    torch.testing.assert_close(ref.rms(x), F.rms_norm(x, (WIDTH,), eps=torch.finfo(torch.float32).eps))

@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 12), window=st.integers(0, 14), seed=st.integers(0, 99))
def test_windowed_attention_is_a_softmax_over_the_visible_keys(length, window, seed):
    q, k, v = normal(3, 1, length, 2, 4, seed=seed)
    out = ref.windowed_attention(q, k, v, window, 0.7)
    for i in range(length):
        seen = slice(max(0, i - window), i + 1)
        for h in range(2):
            weights = torch.softmax(0.7 * k[0, seen, h] @ q[0, i, h], 0)
            torch.testing.assert_close(out[0, i, h], weights @ v[0, seen, h])

def test_rotation_direction_and_relative_positions():
    frequencies = ref.rope_frequencies(4)
    torch.testing.assert_close(frequencies, float64([1, 0.01]))
    x = torch.zeros(1, 3, 1, 4, dtype=torch.float64)
    x[..., 0] = 1  # a' = a cos + b sin, b' = b cos - a sin, pairs (0, 2) and (1, 3)
    expected = float64([math.cos(2), 0, -math.sin(2), 0])
    torch.testing.assert_close(ref.rotate(x, frequencies)[0, 2, 0], expected)

    q, k = (normal(8, seed=s).expand(1, 6, 1, 8) for s in (1, 2))  # the same vector at every position
    q, k = (ref.rotate(x, ref.rope_frequencies(8))[0, :, 0] for x in (q, k))
    scores = q @ k.T
    for distance in range(6):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))

def test_half_truncated_rope_turns_the_first_quarter_with_the_third():
    frequencies = ref.rope_frequencies(128, half_truncated=True)
    assert frequencies.shape == (64,)
    expected = float64([10000 ** (-2 * f / 64) for f in range(32)])
    torch.testing.assert_close(frequencies[:32], expected)
    assert not frequencies[32:].any()
    x = normal(1, 9, 1, 128)
    same = (ref.rotate(x, frequencies) == x)[0, 8, 0]
    stationary = torch.zeros(128, dtype=torch.bool)
    stationary[32:64] = stationary[96:128] = True
    assert torch.equal(same, stationary)

def test_yarn_scales_and_limits():
    base = ref.rope_frequencies(128)
    assert ref.two_hour_stage(1, 128)[:2] == (256, 768)
    for epoch, windows, scale in [
        (6, (256, 768), 0.0883883),
        (7, (768, 1792), 0.1033666),
        (14, (1280, 2048), 0.1061271),
    ]:
        *got_windows, frequencies, got = ref.two_hour_stage(epoch, 128)
        assert (*got_windows,) == windows
        assert got == pytest.approx(scale, abs=5e-8)
    moved, _ = ref.yarn(base, 1.0, 768, 1792)
    rotations = 768 * base / (2 * math.pi)
    assert torch.equal(moved[rotations >= 32], base[rotations >= 32])
    torch.testing.assert_close(moved[rotations <= 1], base[rotations <= 1] * 768 / 1792)
    halfway = float64([16.5 * 2 * math.pi / 768])  # 16.5 rotations lie halfway between 1 and 32
    torch.testing.assert_close(ref.yarn(halfway, 1.0, 768, 1792)[0], halfway * (768 / 1792 + 1) / 2)

def test_bare_model_written_out_with_torchs_operators():
    """Two layers, no optional technique: torch's own attention and norms give the same logits."""
    shapes = ref.parameter_shapes(2, WIDTH, HEADS, HIDDEN, PADDED, iha=False, head_gate=False, mtp=False)
    p = {k: normal(*shape, seed=i) * 0.3 for i, (k, shape) in enumerate(shapes.items()) if "value" not in k}
    net = make_net(windows=(T, T), order=(0, 1), frequencies=STILL)
    tokens = make_tokens()

    def norm(x):
        return F.rms_norm(x, (x.shape[-1],), eps=2**-23)

    def block(x, i):
        q, k, v = (F.linear(norm(x), p[f"blocks.{i}.attn.{name}"]).view(2, T, HEADS, -1).transpose(1, 2)
                   for name in "qkv")
        heads = F.scaled_dot_product_attention(norm(q), norm(k), v, is_causal=True)
        x = x + F.linear(heads.transpose(1, 2).reshape(2, T, WIDTH), p[f"blocks.{i}.attn.o"])
        gate, up, out = (p[f"blocks.{i}.mlp.{n}"] for n in ("gate", "up", "out"))
        return x + F.linear(F.silu(F.linear(norm(x), gate)) * F.linear(norm(x), up), out)

    x0 = norm(F.embedding(tokens, p["embed"]))
    e0 = block(p["lam"][0] * x0 + p["mu"][0] * x0, 0)
    x = e0 + p["skip"][0] * e0
    x = block(p["lam"][1] * x + p["mu"][1] * x0, 1)
    logits = 10 * torch.tanh(F.linear(norm(x), p["head"])[..., :VOCAB] / 10)
    torch.testing.assert_close(ref.forward(p, tokens, net), logits)

def test_replay_repeats_skips_and_mixes_with_the_same_encoder_outputs():
    params, tokens = make_params(mtp=False), make_tokens()
    net = make_net(order=ref.layer_order(LAYERS, (3, 4, 3)))
    x0 = ref.rms(params["embed"][tokens])
    x, e = x0, {}
    steps = [(0, None), (1, None), (2, None), *[(3, 2), (4, 1)] * 3, (5, 0)]  # (layer, its encoder partner)
    for i, partner in steps:
        x = x if partner is None else x + params["skip"][i - 3] * e[partner]
        x = params["lam"][i] * x + params["mu"][i] * x0
        x = ref.block(params, f"blocks.{i}.", x, x0, net, net.windows[i])
        if partner is None:
            e[i] = x
    torch.testing.assert_close(ref.trunk(params, tokens, net), ref.rms(x))
    assert not torch.allclose(ref.trunk(params, tokens, make_net()), ref.rms(x))

@pytest.mark.parametrize(
    ("key", "neutral"),
    [
        ("mix", torch.eye(HEADS, dtype=torch.float64).expand(3, HEADS, HEADS)),
        ("xsa", torch.zeros(HEADS, dtype=torch.float64)),
    ],
)
def test_a_technique_at_its_neutral_value_is_the_technique_left_out(key, neutral):
    params, tokens = make_params(xsa=True), make_tokens()
    with_neutral = {k: neutral if k.endswith(key) else v for k, v in params.items()}
    without = {k: v for k, v in params.items() if not k.endswith(key)}
    on, off, none = (ref.forward(p, tokens, make_net()) for p in (params, with_neutral, without))
    torch.testing.assert_close(off, none)
    assert not torch.allclose(on, none)

def test_zero_gates_pass_values_whole_and_heads_by_half():
    params, tokens = make_params(), make_tokens()
    gates = {k: torch.zeros_like(v) if "gate" in k and "attn" in k else v for k, v in params.items()}
    halved = {k: v / 2 if k.endswith("attn.o") else v for k, v in gates.items() if "head_gate" not in k}
    logits = ref.forward(gates, tokens, make_net())
    torch.testing.assert_close(logits, ref.forward(halved, tokens, make_net()))
    assert not torch.allclose(logits, ref.forward(params, tokens, make_net()))

def attend(params, x, x0=None, **changes):
    """Attention of one layer without rotation, every weight the identity unless given."""
    eye = torch.eye(WIDTH, dtype=torch.float64)
    net = make_net(frequencies=STILL, **changes)
    p = {f"attn.{n}": eye for n in "qkvo"} | {f"attn.{k}": v for k, v in params.items()}
    return ref.attention(p, "attn.", x, x0, net, T, key_offset=0 in net.key_offset_layers)

def test_interleaved_heads_mix_the_weights_of_all_heads():
    x, weights, mix = normal(1, T, WIDTH), normal(3, WIDTH, WIDTH, seed=1), normal(3, HEADS, HEADS, seed=2)
    mixed = torch.zeros_like(weights)
    for which in range(3):
        for h in range(HEADS):
            for m in range(HEADS):
                rows, other = (slice(i * HEAD_WIDTH, (i + 1) * HEAD_WIDTH) for i in (h, m))
                mixed[which, rows] += mix[which, h, m] * weights[which, other]
    expected = attend(dict(zip("qkv", mixed)), x)
    torch.testing.assert_close(attend({"mix": mix, **dict(zip("qkv", weights))}, x), expected)

def test_exclusive_attention_removes_the_own_value():
    x = normal(1, T, WIDTH)
    v = x.view(1, T, HEADS, HEAD_WIDTH)

    def alignment(xsa):
        out = attend({"xsa": torch.full((HEADS,), xsa).double()}, x).view(1, T, HEADS, HEAD_WIDTH)
        return (out * v).sum(-1)

    torch.testing.assert_close(alignment(1e3), torch.zeros(1, T, HEADS).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(alignment(1.0), alignment(0.0) * (1 - math.tanh(1)))

    short = 5e-5 * v[:, :1] / v[:, :1].norm(dim=-1, keepdim=True)  # half the least norm that counts whole
    out = attend({"xsa": torch.full((HEADS,), 1e3).double()}, short.flatten(-2)).view_as(short)
    torch.testing.assert_close(out, short * (1 - 0.5**2))

def test_value_injection_adds_the_gated_projection_of_the_embedding():
    x, x0 = normal(2, 1, 1, WIDTH)  # one position, which sees itself alone: attention returns its value
    projection, gate = normal(WIDTH, WIDTH, seed=1), normal(HEADS, 32, seed=2)
    out = attend({"value_proj": projection, "value_gate": gate}, x, x0)
    factor = 2 * torch.sigmoid(gate @ x[0, 0, :32]).repeat_interleave(HEAD_WIDTH)
    torch.testing.assert_close(out, x + factor * (x0 @ projection.T))

def test_head_gate_reads_the_first_twelve_channels():
    x, gate = normal(1, T, WIDTH), normal(HEADS, 12, seed=1)
    factor = torch.sigmoid(x[..., :12] @ gate.T).repeat_interleave(HEAD_WIDTH, dim=-1)
    torch.testing.assert_close(attend({"head_gate": gate}, x), attend({}, x) * factor)

def test_a_given_scale_replaces_the_default():
    x = normal(1, T, WIDTH)
    torch.testing.assert_close(attend({}, x, scale=HEAD_WIDTH**-0.5), attend({}, x))
    seen = torch.arange(1, T + 1)[:, None]
    torch.testing.assert_close(attend({}, x, scale=0.0), x.cumsum(1) / seen)  # all keys alike

def test_key_offset_takes_the_second_half_from_the_position_before():
    x = normal(1, T, WIDTH)
    out = attend({}, x, key_offset_layers=(0,)).view(T, HEADS, HEAD_WIDTH)
    k = ref.rms(x.view(T, HEADS, HEAD_WIDTH))
    half = HEAD_WIDTH // 2
    for i in (0, 1, 7):
        keys = [torch.cat([k[j, :, :half], k[max(j - 1, 0), :, half:]], -1) for j in range(i + 1)]
        weights = torch.einsum("jhc,hc->jh", torch.stack(keys), k[i]).div(HEAD_WIDTH**0.5).softmax(0)
        values = x.view(T, HEADS, HEAD_WIDTH)[: i + 1]
        torch.testing.assert_close(out[i], torch.einsum("jh,jhc->hc", weights, values))

def test_passes_feed_the_trunk_into_itself_and_only_the_last_has_a_gradient():
    params, tokens = make_params(iha=False, mtp=False, xsa=True), make_tokens()
    twice = make_net(passes=2, norm_passes=True)

    def gradient_of_embedding(params, net):
        leaf = params["embed"].clone().requires_grad_()
        ref.trunk(params | {"embed": leaf}, tokens, net).pow(3).sum().backward()
        return leaf.grad

    assert gradient_of_embedding(params, twice).any()  # through the anchor X0 of the last pass
    no_anchor = {k: torch.zeros_like(v) if k == "mu" else v for k, v in params.items() if "value" not in k}
    assert gradient_of_embedding(no_anchor, make_net()).any()
    assert not gradient_of_embedding(no_anchor, twice).any()

    once = ref.trunk(no_anchor, tokens, make_net())
    embedded = no_anchor | {"embed": once.flatten(0, 1)}  # start again from what came out
    again = ref.trunk(embedded, torch.arange(2 * T).view(2, T), make_net())
    # the RMS norms that the two ways don't share move a unit vector by epsilon = 1.2e-7 alone
    torch.testing.assert_close(ref.trunk(no_anchor, tokens, twice), again, rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize("passes", [1, 2])
def test_no_logit_depends_on_a_later_token(passes):
    params, tokens = make_params(xsa=True), make_tokens()
    net = make_net(order=ref.layer_order(LAYERS, (3, 4, 2)), key_offset_layers=(3, 5), passes=passes)
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] + 1) % VOCAB
    before, after = ref.forward(params, tokens, net), ref.forward(params, changed, net)
    assert torch.equal(before[:, :15], after[:, :15])
    assert ((before != after)[:, 15:]).any(-1).all()
    assert before.shape == (2, T, VOCAB) and before.abs().max() < 10


# ---- Losses ------------------------------------------------------------------------------------------------

def test_cross_entropy_is_torchs():
    logits, targets = normal(2, 5, VOCAB) * 3, make_tokens(2, 5)
    expected = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(ref.cross_entropy(logits, targets), expected)

def test_training_loss_is_next_token_plus_the_extra_block():
    params, sequences, net = make_params(), make_tokens(2, T + 1), make_net()
    x = ref.trunk(params, sequences[:, :-1], net)
    losses = []
    for row in range(2):
        u = torch.stack(
            [
                params["mtp.proj"] @ torch.cat([x[row, t], ref.rms(params["embed"][sequences[row, t + 1]])])
                for t in range(T - 1)
            ]
        )
        u = ref.rms(ref.block(params, "mtp.block.", u[None], None, net, 10**6))[0]
        for t in range(T - 1):
            logits = 10 * torch.tanh(params["head"][:VOCAB] @ u[t] / 10)
            losses.append(F.cross_entropy(logits, sequences[row, t + 2]))
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(ref.mtp_loss(params, x, sequences, net), expected)
    total = ref.language_loss(params, sequences, net) + 0.3 * expected
    torch.testing.assert_close(ref.training_loss(params, sequences, net), total)

def test_head_mtp_stays_within_its_sequence():
    logits, targets, weights = normal(2, 5, VOCAB), make_tokens(2, 5), (1, 0.5, 0.25)
    total = 0.0
    for row in range(2):
        for t in range(5):
            for k, w in enumerate(weights):
                if t + k < 5:
                    total += w * F.cross_entropy(logits[row, t], targets[row, t + k])
    torch.testing.assert_close(ref.head_mtp_loss(logits, targets, weights), total / 10)

@pytest.mark.parametrize(
    ("progress", "weights"),
    [
        (0, (1, 0.5, 0.25)),
        (0.165, (1, 0.5, 0.125)),
        (0.33, (1, 0.5, 0)),
        (0.495, (1, 0.25, 0)),
        (0.66, (1, 0, 0)),
        (0.9, (1, 0, 0)),
    ],
)
def test_head_mtp_weights(progress, weights):
    assert ref.head_mtp_weights(progress) == pytest.approx(weights, abs=1e-12)

def test_distillation_is_torchs_kl_divergence():
    student, teacher = normal(7, VOCAB, seed=1), normal(7, VOCAB, seed=2)
    kl = F.kl_div((student / 1.2).log_softmax(-1), (teacher / 1.2).softmax(-1), reduction="batchmean")
    got = ref.distillation_loss(student, teacher, 3.0, alpha=0.45, temperature=1.2)
    torch.testing.assert_close(got, 0.55 * 3.0 + 0.45 * 1.44 * kl)


# ---- Optimizer ---------------------------------------------------------------------------------------------

TOY_WEIGHT = float64([[1, -1, 0.5], [-0.5, 0.25, 2]])
TOY_GRADIENT = float64([[0.1, -0.2, 0.3], [0.05, 0.4, -0.1]])

@pytest.mark.parametrize(
    ("flip", "weight", "second"),
    [
        (
            False,
            [[0.979936, -0.985312, 0.484846], [-0.505097, 0.238204, 1.973004]],
            [[0.006966, 0.026771, 0.023171]],
        ),
        (
            True,
            [[0.976027, -0.505046], [-0.980665, 0.237152], [0.483025, 2.003005]],
            [[0.016073], [0.016073], [0.013]],
        ),
    ],
)
def test_muon_check_values(flip, weight, second):
    w, g = (x.T.contiguous() if flip else x for x in (TOY_WEIGHT, TOY_GRADIENT))
    w, buffer, s = ref.muon_step(w, g, *ref.muon_state(w), lr=0.01, momentum=0.85, weight_decay=1.3)
    torch.testing.assert_close(w, float64(weight), atol=1e-6, rtol=0)
    torch.testing.assert_close(s, float64(second), atol=1e-6, rtol=0)
    torch.testing.assert_close(buffer, 0.15 * g)

@pytest.mark.parametrize(
    ("sigma", "mapped"),
    [
        (1e-4, 0.0988),
        (1e-3, 0.8589),
        (3e-3, 0.9664),
        (0.01, 1.0271),
        (0.03, 1.0605),
        (0.1, 1.0592),
        (0.3, 0.9831),
        (0.6, 0.8713),
        (1 / 1.02, 0.9035),
    ],
)
def test_polar_express_anchors(sigma, mapped):
    assert ref.polar_express_scalar(sigma) == pytest.approx(mapped, abs=5.1e-5)

@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_polar_express_maps_singular_values_and_keeps_the_vectors(shape):
    g = normal(*shape)
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    mapped = ref.polar_express_scalar(s / (1.02 * g.norm() + 1e-6))
    torch.testing.assert_close(ref.polar_express(g), u @ torch.diag(mapped) @ v)

@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), seed=st.integers(0, 99))
def test_variance_reduction_keeps_the_length_of_the_update(rows, columns, seed):
    w, g = normal(2, rows, columns, seed=seed)
    moved, _, _ = ref.muon_step(w, g, *ref.muon_state(w), 0.01, 0.95, 0.0, normalize_rows=False)
    update = (w - moved) / (0.01 * math.sqrt(max(1, rows / columns)))
    torch.testing.assert_close(update.norm(), ref.polar_express(0.05 * 1.95 * g).norm())

def test_adamw_check_value():
    w, g, zero = float64([1, -2, 0.5]), float64([0.1, 0.2, -0.3]), float64([0, 0, 0])
    moved, _, _ = ref.adamw_step(w, g, zero, zero, 1, 0.01, (0.8, 0.95), 1.3)
    torch.testing.assert_close(moved, float64([0.9770, -1.9840, 0.5035]), atol=1e-8, rtol=0)

def test_adamw_is_torchs():
    weight = torch.nn.Parameter(normal(3, 4))
    optimizer = torch.optim.AdamW([weight], lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=1.3)
    w, m, v = weight.detach().clone(), torch.zeros(3, 4).double(), torch.zeros(3, 4).double()
    for t in range(1, 6):
        weight.grad = normal(3, 4, seed=t)
        optimizer.step()
        w, m, v = ref.adamw_step(w, weight.grad, m, v, t, 0.01, (0.8, 0.95), 1.3)
    torch.testing.assert_close(w, weight.detach())

def test_muon_momentum():
    got = [ref.muon_momentum(it) for it in (0, 150, 300, 2000)]
    assert got == pytest.approx([0.85, 0.9, 0.95, 0.95])


# ---- Schedules ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    ("targets", "epochs", "steps"),
    [
        (99_942_400, 12, 2288),
        (99_942_400, 11, 2097),
        (99_942_400, 20, 3812),
        (99_942_400, 22, 4194),
        (99_876_864, 16, 3048),
        (99_614_720, 16, 3040),
        (99_614_720, 15, 2850),
        (99_942_400, 32, 6100),
    ],
)
def test_planned_steps(targets, epochs, steps):
    assert ref.planned_steps(targets, epochs) == steps

@pytest.mark.parametrize(("name", "start"), [("limited 13-15", 1716), ("limited 16-19", 1525.09),
                                             ("two_hour 1-3", 3240.2), ("two_hour 4-6", 2668.91)]
                         + [("tiny 9-11,13", 2280), ("tiny 12,14-15", 2090)])
def test_starts_of_the_cyclic_tails(name, start):
    assert ref.cycle_position(0, ref.SCHEDULES[name])[0] == pytest.approx(start, abs=5e-3)

ANCHORS = {  # step: (lr multiplier, weight decay)
    "limited 20-21": {
        838: (1, 1),
        1181: (1, 0.825482),
        1525: (1, 0.650046),
        1526: (0.999947, 0.654053),
        1620: (0.528202, 1.073176),
        1678: (0.138885, 1.331784),
        1679: (0.134272, 1.336242),
        1715: (0.050032, 1.496757),
        1716: (0.953572, 0.651216),
        1907: (0.673378, 0.652837),
        2001: (0.266739, 1.071960),
        2096: (0.05, 1.495541),
    },
    "two_hour 4-6": {
        1678: (1, 0.999859),
        2668: (1, 0.650321),
        2669: (0.999999, 0.650405),
        2764: (0.526779, 1.073987),
        2860: (0.999987, 0.652027),
        3355: (0.379707, 1.159108),
        3356: (0.372072, 1.163567),
        4004: (0.475867, 0.652837),
        4098: (0.195751, 1.071960),
        4193: (0.05, 1.495541),
    },
    "tiny 12,14-15": {
        381: (1, 0.799386),
        950: (1, 0.45),
        1520: (1, 0.1),
        1711: (0.999123, 0.219195),
        1995: (0.75, 0.396429),
        2090: (0.666667, 0.455714),
        2185: (0.316667, 0.515),
        2280: (0.5, 0.574286),
        2660: (0.166667, 0.811429),
        2849: (0.05, 0.929376),
    },
    # By hand: the last fifth, 1220 and 610 steps, falls to 0 in a straight line.
    "unlimited 9-11": {0: (1, 1), 4880: (1, 1), 4881: (0.999180, 1), 5490: (0.5, 1), 6099: (0.000820, 1)},
    "unlimited 9-11, first member": {
        0: (1, 1), 2440: (1, 1), 2441: (0.998361, 1), 2745: (0.5, 1), 3049: (0.001639, 1)
    },
}

@pytest.mark.parametrize("name", ANCHORS)
def test_schedule_anchors(name):
    schedule = ref.SCHEDULES[name]
    unit = schedule.weight_decay if schedule.wd == "piecewise" else 1  # tiny's anchors are absolute
    for it, (lr, wd) in ANCHORS[name].items():
        assert ref.lr_multiplier(it, schedule) == pytest.approx(lr, abs=6e-7), it
        assert unit * ref.wd_multiplier(it, schedule) == pytest.approx(wd, abs=6e-7), it

def test_schedules_without_cycles_end_next_to_zero():
    schedule = ref.SCHEDULES["limited 1-6"]
    assert [ref.lr_multiplier(it, schedule) for it in (0, 1144, 1716, 2287)] == [1, 1, 0.5, 1 / 1144]
    assert {ref.wd_multiplier(it, schedule) for it in range(2288)} == {1.0}


# ---- Data order --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    ("n", "seed", "first"),
    [
        (48804, 1001, [38201, 43298, 35105, 11343, 27570, 12495]),
        (48804, 1002, [26283, 2365, 21579, 12985, 18748, 29740]),
        (1525, 2, [1273, 40, 1204, 1355, 237, 144]),
        (190, 2, [88, 151, 91, 178, 54, 49]),
    ],
)
def test_permutation_anchors(n, seed, first):
    assert ref.permutation(n, seed)[:6].tolist() == first

def test_step_shuffle_accumulates():
    assert ref.step_shuffle(190, 1).tolist() == list(range(190))
    assert ref.step_shuffle(190, 2)[:3].tolist() == [88, 151, 91]
    third = torch.randperm(190, generator=torch.Generator().manual_seed(3))
    assert torch.equal(ref.step_shuffle(190, 3), ref.step_shuffle(190, 2)[third])

@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20), size=st.integers(1, 5),
       epoch=st.integers(1, 4))
def test_document_shuffle_by_undoing_it(lengths, size, epoch):
    """Undo the sequences' permutation: whole documents are left, in the order of the seeds 2..epoch."""
    documents = [[100 * i + j for j in range(n)] for i, n in enumerate(lengths)]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    tokens = torch.tensor([token for document in documents for token in document])
    sequences = ref.epoch_sequences(tokens, starts, epoch, size)
    n = len(tokens) // size
    stream = torch.empty_like(sequences)
    stream[torch.randperm(n, generator=torch.Generator().manual_seed(1000 + epoch))] = sequences

    order = list(range(len(documents)))
    for e in range(2, epoch + 1):
        picks = torch.randperm(len(documents), generator=torch.Generator().manual_seed(e))
        order = [order[i] for i in picks]
    expected = [token for i in order for token in documents[i]][: n * size]
    assert stream.flatten().tolist() == expected


# ---- Averages, ensembles, snapshot chains ------------------------------------------------------------------

def test_mixture_is_the_mean_of_probabilities():
    members, targets = normal(3, 5, VOCAB), make_tokens(1, 5)[0]
    weights = ref.recency_weights(3)
    assert weights == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    mean = torch.einsum("m,mtv->tv", float64(weights), members.softmax(-1))
    got = ref.mixture_loss(members, weights, targets)
    torch.testing.assert_close(got, F.nll_loss(mean.log(), targets, reduction="none"))

def test_debiased_ema_is_a_weighted_mean_of_every_tenth_step():
    beta = ref.debiased_ema_beta(190)
    assert beta == pytest.approx(0.9049746, abs=5e-8)
    values = list(normal(31, 4))
    shares = float64([beta**age for age in (3, 2, 1, 0)])
    expected = (shares / shares.sum()) @ torch.stack([values[it] for it in (0, 10, 20, 30)])
    torch.testing.assert_close(ref.debiased_ema(values, beta), expected)

def test_ema_blend_starts_with_the_weights_at_nine_tenths():
    values = list(normal(100, 4))  # enters: after the steps 90 (start) and 100
    shadow = 0.95 * values[89] + 0.05 * values[99]
    torch.testing.assert_close(ref.ema_blend(values, 0.7), 0.7 * values[99] + 0.3 * shadow)

def test_snapshot_cycles():
    large = [c for c in range(96) if ref.snapshot_batch(c, 96) == 524288]
    assert large == list(range(24, 72))
    assert [ref.snapshot_cycle_steps(99_942_400, b) for b in (524288, 393216)] == [381, 508]
    assert [ref.snapshot_lr_multiplier(s, 400) for s in (0, 200, 400)] == pytest.approx([1, 0.54, 0.08])
    assert [ref.snapshot_wd_multiplier(s, 400) for s in (0, 200, 400)] == pytest.approx([0.7, 0.85, 1])
    assert [ref.perturbation_scale(c, 96) for c in (1, 48, 95)] == pytest.approx([0.25, 0.15, 0.05])

def test_selection_recovers_a_planted_mixture():
    """Tokens drawn from 0.7 a + 0.3 b, among members c, d and e that are of no use."""
    generator = torch.Generator().manual_seed(1)
    vocabularies = normal(5, 40, seed=3).mul(1.5).softmax(-1)
    planted = float64([0.7, 0.3, 0, 0, 0])
    tokens = torch.multinomial(planted @ vocabularies, 20000, replacement=True, generator=generator)
    probabilities = vocabularies[:, tokens]
    weights = ref.select_weights(probabilities)
    torch.testing.assert_close(weights, planted, atol=0.03, rtol=0)
    assert (weights @ probabilities).log().mean() >= (planted @ probabilities).log().mean()
    indices, top = ref.top_k(weights, 2)
    assert indices.tolist() == [0, 1]
    torch.testing.assert_close(top, weights[:2] / weights[:2].sum())
