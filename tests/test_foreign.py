"""The laws on models nobody here wrote, against what each library's own names say is a linear weight."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

# The models are tiny and run twice: compiling is what costs.
jit = lambda f: jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})  # noqa: E731


def package(name: str) -> ModuleType:
    return pytest.importorskip(name, reason='needs pip install -e ".[models]"')


@dataclass(frozen=True)
class Row:
    """A model and, by its library's naming, its linear weights (a pattern), its heads, and what is left out and why."""

    name: str
    build: Callable[[], tuple]  # fn, params, args
    linear: str
    head: tuple[str, ...] = ()
    but: dict[str, str] = field(default_factory=dict)


def paths(tree) -> list[str]:
    return [jax.tree_util.keystr(k, simple=True, separator="/") for k, _ in jax.tree.leaves_with_path(tree)]


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def fill(shapes):
    """Random values of the right size: the libraries start biases and some kernels at zero."""
    rng = np.random.default_rng(0)

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-1]
        x = rng.standard_normal(leaf.shape)
        if len(leaf.shape) > 1:
            x = x / np.sqrt(np.prod(leaf.shape[:-1]))
        else:
            x = 0.1 * x + (name in ("scale", "var", "weight"))
        return jnp.asarray(np.abs(x) if name == "var" else x, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


# Language, vision and speech: transformers.

IDS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]], np.int32)
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SIZES, "vocab_size": 37, "num_hidden_layers": 1, "max_position_embeddings": 16}
IMAGES = {**SIZES, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
TWO_STACKS = {
    **{"vocab_size": 37, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0},
    **{"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}


def transformers(model: str, config: str, settings: dict, *args, out: str = "logits"):
    def build():
        library = package("transformers")
        made = getattr(library, model)(getattr(library, config)(**settings), _do_init=False)

        def fn(params, *args):
            result = made(*args, params=params)
            return dict(result.items()) if out == "all" else result[out]

        return fn, dict(fill(made.params_shape_tree)), args

    return build


# Diffusion: diffusers.


def unet():
    made = package("diffusers").FlaxUNet2DConditionModel(
        sample_size=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(32,),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=12,
    )
    args = normal(2, 4, 4, 4), jnp.array([3, 7]), normal(2, 5, 12)
    params = fill(jax.eval_shape(made.init_weights, jax.random.key(0)))
    return lambda p, *a: made.apply({"params": p}, *a).sample, params, args


def autoencoder():
    made = package("diffusers").FlaxAutoencoderKL(
        block_out_channels=(32,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        sample_size=8,
    )
    params = fill(jax.eval_shape(made.init_weights, jax.random.key(0)))
    return lambda p, x: made.apply({"params": p}, x).sample, params, (normal(2, 3, 8, 8),)


# Recurrent, graphs, equivariant: haiku and what is built on it.


def haiku(forward: Callable, *args) -> tuple:
    made = package("haiku").transform(forward)
    params = fill(jax.eval_shape(made.init, jax.random.key(0), *args))
    return lambda p, *a: made.apply(p, None, *a), params, args


def recurrent():
    hk = package("haiku")

    def forward(x):
        for core in hk.GRU(8), hk.LSTM(6):
            x, _ = hk.dynamic_unroll(core, x, core.initial_state(2))
        return hk.Linear(3)(x)

    return haiku(forward, normal(5, 2, 8))


def graph_attention():
    hk, jraph = package("haiku"), package("jraph")

    def forward(graph):
        for _ in range(2):
            graph = jraph.GAT(
                attention_query_fn=lambda n: hk.Linear(8)(n),
                attention_logit_fn=lambda s, r, e: hk.Linear(1)(jax.nn.leaky_relu(s + r)),
                node_update_fn=jax.nn.elu,
            )(graph)
        return hk.Linear(2)(graph.nodes)

    links = {"senders": jnp.array([0, 1, 2, 3, 4, 5, 0, 2]), "receivers": jnp.array([1, 2, 0, 4, 5, 3, 2, 1])}
    counts = {"n_node": jnp.array([3, 3]), "n_edge": jnp.array([4, 4])}
    return haiku(forward, jraph.GraphsTuple(nodes=normal(6, 5), edges=None, globals=None, **links, **counts))


def tensor_product():
    e3nn, layers = package("e3nn_jax"), package("e3nn_jax.haiku")

    def forward(a, b):
        a, b = e3nn.IrrepsArray("4x0e+2x1o", a), e3nn.IrrepsArray("2x0e+1x1o", b)
        return layers.Linear("2x0e")(layers.FullyConnectedTensorProduct("3x0e+2x1o")(a, b)).array

    return haiku(forward, normal(5, 10), normal(5, 5, seed=1))


# Recommendation: keras.


def recommendation():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = package("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("keras runs on another backend here")
    layers = keras.layers
    numbers, kinds = keras.Input((4,)), keras.Input((3,), dtype="int32")
    dense = layers.Dense(8, activation="tanh", name="bottom")(numbers)
    looked_up = [layers.Embedding(11, 8, name=f"table{i}")(kinds[:, i]) for i in range(3)]
    features = keras.ops.stack([dense, *looked_up], 1)
    pairs = layers.Flatten()(keras.ops.matmul(features, keras.ops.transpose(features, (0, 2, 1))))
    hidden = layers.Dense(6, activation="tanh", name="top")(layers.Concatenate()([dense, pairs]))
    click = layers.Dense(1, activation="sigmoid", name="click")(hidden)
    made = keras.Model([numbers, kinds], click)
    names = [v.path for v in made.trainable_variables]

    def fn(params, *args):
        return made.stateless_call([params[n] for n in names], [], list(args))[0]

    params = fill({v.path: v.value for v in made.trainable_variables})
    return fn, params, (normal(2, 4), jnp.array([[1, 2, 3], [4, 5, 6]]))


# Other ways to hold parameters: penzai's named arrays, equinox's modules.


def penzai():
    pz, llamalike = package("penzai.pz"), package("penzai.models.transformer.variants.llamalike_common")
    config = llamalike.LlamalikeTransformerConfig(
        **{"num_kv_heads": 2, "query_head_multiplier": 2, "embedding_dim": 16, "projection_dim": 4},
        **{"mlp_hidden_dim": 24, "num_decoder_blocks": 1, "vocab_size": 19, "mlp_variant": "swiglu"},
        **{"tie_embedder_and_logits": False, "rope_wavelength": 100, "rms_norm_eps": 1e-5},
        **{"query_scaling_factor": "default", "parameter_dtype": jnp.float32, "activation_dtype": jnp.float32},
        attention_type=llamalike.AttentionTypeGlobalCausal(),
        use_layer_stack=False,
    )
    made = llamalike.build_llamalike_transformer(config, init_base_rng=jax.random.key(0))
    made, values = pz.unbind_params(made, freeze=True)

    def fn(params, ids):
        bound = pz.bind_variables(made, [pz.ParameterValue(label=n, value=v) for n, v in params.items()])
        return bound(pz.nx.wrap(ids).tag("batch", "seq")).unwrap("batch", "seq", "vocabulary")

    return fn, {v.label: v.value for v in values}, (jnp.arange(10).reshape(2, 5),)


def equinox():
    eqx = package("equinox")

    def make(key):
        names = "convolution", "attention", "cell", "head"
        parts = eqx.nn.Conv1d(8, 8, 3, padding=1, groups=2, key=key), eqx.nn.MultiheadAttention(2, 8, key=key)
        return dict(zip(names, (*parts, eqx.nn.GRUCell(8, 6, key=key), eqx.nn.Linear(6, 3, key=key)), strict=True))

    shapes, static = eqx.partition(
        eqx.filter_eval_shape(make, jax.random.key(0)), lambda x: isinstance(x, jax.ShapeDtypeStruct)
    )

    def fn(params, x):
        parts = eqx.combine(params, static)

        def one(x):
            x = jax.nn.gelu(parts["convolution"](x.T).T)
            x = x + parts["attention"](x, x, x)

            def step(state, x):
                state = parts["cell"](x, state)
                return state, state

            return jax.vmap(parts["head"])(jax.lax.scan(step, jnp.zeros(6), x)[1])

        return jax.vmap(one)(x)

    return fn, fill(shapes), (normal(2, 5, 8),)


ONLY_INVARIANT = "feeds the vector part of the product, which an invariant output leaves out"
ROWS = [
    Row(
        "transformers_gpt2",
        transformers(
            "FlaxGPT2LMHeadModel",
            "GPT2Config",
            {"vocab_size": 37, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2},
            IDS,
        ),
        linear=r".*/kernel",
        head=("transformer/wte/embedding",),
    ),
    Row(
        "transformers_bert",
        transformers("FlaxBertForMaskedLM", "BertConfig", TEXT, IDS),
        linear=r".*/kernel",
        head=("bert/embeddings/word_embeddings/embedding",),
    ),
    Row(
        "transformers_bart",
        transformers(
            "FlaxBartForConditionalGeneration", "BartConfig", {**TWO_STACKS, "max_position_embeddings": 16}, IDS
        ),
        linear=r".*/kernel",
        head=("model/shared/embedding",),
    ),
    Row(
        "transformers_vit",
        transformers("FlaxViTForImageClassification", "ViTConfig", IMAGES, normal(2, 3, 16, 16)),
        linear=r".*/kernel",
        head=("classifier/kernel",),
    ),
    Row(
        "transformers_resnet",
        transformers(
            "FlaxResNetForImageClassification",
            "ResNetConfig",
            {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
            normal(2, 3, 16, 16),
        ),
        linear=r".*/kernel",
        head=("params/classifier/1/kernel",),
    ),
    Row(
        "transformers_clip",
        transformers(
            "FlaxCLIPModel",
            "CLIPConfig",
            {"text_config": TEXT, "vision_config": IMAGES, "projection_dim": 12},
            IDS,
            normal(2, 3, 16, 16),
            out="all",
        ),
        linear=r".*/kernel",
    ),
    Row(
        "transformers_whisper",
        transformers(
            "FlaxWhisperForConditionalGeneration",
            "WhisperConfig",
            {**TWO_STACKS, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16},
            normal(2, 8, 20),
            IDS,
        ),
        linear=r".*/kernel",
        head=("model/decoder/embed_tokens/embedding",),
    ),
    Row(
        "transformers_wav2vec2",
        transformers(
            "FlaxWav2Vec2ForCTC",
            "Wav2Vec2Config",
            {
                **{**SIZES, "vocab_size": 37, "num_hidden_layers": 1, "num_feat_extract_layers": 2},
                **{"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "feat_extract_norm": "layer"},
                **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True},
            },
            normal(2, 64),
        ),
        linear=r".*/(kernel|weight_v)",
        head=("lm_head/kernel",),
        but={"wav2vec2/encoder/pos_conv_embed/conv/weight_v": "the kernel is this divided by its own norm"},
    ),
    Row("diffusers_unet", unet, linear=r".*/kernel", head=("conv_out/kernel",)),
    Row("diffusers_autoencoder", autoencoder, linear=r".*/kernel", head=("decoder/conv_out/kernel",)),
    Row("haiku_recurrent", recurrent, linear=r".*/(w|w_h|w_i)", head=("linear/w",)),
    Row("jraph_graph_attention", graph_attention, linear=r".*/w", head=("linear_4/w",)),
    Row(
        "e3nn_tensor_product",
        tensor_product,
        linear=r".*/w\[.*",
        head=("linear/w[0,0] 3x0e,2x0e",),
        but={
            "fully_connected_tensor_product/w[0,1,1] 4x0e,1x1o,2x1o": ONLY_INVARIANT,
            "fully_connected_tensor_product/w[1,0,1] 2x1o,2x0e,2x1o": ONLY_INVARIANT,
        },
    ),
    Row("keras_recommendation", recommendation, linear=r".*kernel", head=("click/kernel",)),
    Row(
        "penzai_llama",
        penzai,
        linear=r".*(?<!/scale)\.weights/data_array",
        head=("transformer/lm_head.weights/data_array",),
    ),
    Row("equinox_modules", equinox, linear=r".*/weight(_ih|_hh)?", head=("head/weight",)),
]


@dataclass
class Model:
    row: Row
    fn: Callable
    params: object
    args: tuple
    sites: jlora.Sites
    lora: dict


@pytest.fixture(scope="module", params=ROWS, ids=[r.name for r in ROWS])
def model(request) -> Model:
    """Of module scope, so set up outside the strict promotion of the other tests, which these libraries do not meet."""
    row = request.param
    fn, params, args = row.build()
    sites = jlora.sites(fn, params, *args)
    rank = min(2, *(s.max_rank for s in sites.values() if not s.head))
    rule = jlora.LoRA(rank=rank, alpha=2 * rank, targets="all-linear")
    return Model(row, fn, params, args, sites, jlora.init(jax.random.key(0), params, sites, rule))


@dataclass
class Numbers:
    """Outputs of base and adapted model, and the gradients with and without forming the weights."""

    base: object
    fresh: object
    adapted: object
    merged: object
    grad: dict
    grad_through_merge: dict


@pytest.fixture(scope="module")
def numbers(model: Model) -> Numbers:
    apply = jlora.wrap(model.fn)

    def loss(out):
        return sum(jnp.sin(x).sum() for x in jax.tree.leaves(out)), out

    def factored(lora, params, args):
        return jax.grad(lambda lora: loss(apply(params, lora, *args)), has_aux=True)(lora)

    def plain(params, args):
        return jax.grad(lambda params: loss(model.fn(params, *args)), has_aux=True)(params)

    def through_merge(lora, params, grads):
        return jax.vjp(lambda lora: jlora.merge(params, lora), lora)[1](grads)[0]

    factored, plain = jit(factored), jit(plain)
    rng = np.random.default_rng(1)
    lora = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.7 / np.sqrt(max(x.shape)), x.dtype), model.lora
    )
    merged = jit(jlora.merge)(model.params, lora)
    assert jax.tree.structure(merged) == jax.tree.structure(model.params)
    _, base = plain(model.params, model.args)
    dense_grads, out_merged = plain(merged, model.args)
    _, fresh = factored(model.lora, model.params, model.args)
    grads, adapted = factored(lora, model.params, model.args)
    return Numbers(base, fresh, adapted, out_merged, grads, jit(through_merge)(lora, model.params, dense_grads))


def difference(got, expected) -> float:
    """The largest difference between two trees, relative to the size of the leaf it is in (or to one)."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    worst = 0.0
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert np.isfinite(x).all()
        worst = max(worst, float(np.abs(x - y).max()) / max(1.0, float(np.abs(y).max())))
    return worst


def test_every_leaf_is_accounted_for(model: Model):
    assert sorted([*model.sites, *model.sites.skipped]) == sorted(paths(model.params))
    assert all(s.reason for s in model.sites.skipped.values())


def test_all_linear_is_what_the_librarys_names_say(model: Model):
    row = model.row
    named = {p for p in paths(model.params) if re.fullmatch(row.linear, p)}
    assert set(row.but) <= named & set(model.sites.skipped)
    assert {p for p, s in model.sites.items() if s.head} == set(row.head)
    assert set(model.lora) == named - set(row.head) - set(row.but)


def test_fresh_adapter_is_the_identity(numbers: Numbers):
    assert difference(numbers.fresh, numbers.base) < 1e-6


def test_apply_equals_merge_then_base(numbers: Numbers):
    assert difference(numbers.adapted, numbers.merged) < 1e-4
    assert difference(numbers.adapted, numbers.base) > 1e-2


def test_gradients_are_those_through_merge(numbers: Numbers):
    assert difference(numbers.grad, numbers.grad_through_merge) < 1e-4
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(numbers.grad))
