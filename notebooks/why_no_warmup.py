# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Why warm-up, and why not
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/clars-optax/clars_optax/blob/main/notebooks/why_no_warmup.ipynb)
#
# The analysis of [CLARS](https://arxiv.org/abs/2002.01576) explains warm-up by two numbers of each
# layer $k$. How fast its gradient changes, $L_k$, bounds the rate that it can bear. How much the
# examples disagree, $M_k = \frac{1}{N} \sum_i \|g_i\|^2 / \|\frac{1}{N} \sum_i g_i\|^2$, says how
# much of an example's gradient is left in the mean. Both are measured here, in every layer and
# epoch, for a sigmoid network on which warm-up matters and for a ResNet, on scikit-learn's digits
# with half of the training set per step.

# %% tags=["skip-execution"]
# !git clone -q https://github.com/clars-optax/clars_optax
# %cd clars_optax
# %pip install -q -e '.[study]'

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import clars_optax
from train.models import make_model
from train.optimizers import make_optimizer
from train.schedules import make_schedule

BATCH = 640
digits = load_digits()
images = (digits.images[..., None].astype("float32") - 4.9) / 6.0
x, _, y, _ = train_test_split(
    images, digits.target, test_size=517, random_state=0, stratify=digits.target
)


class SigmoidNet(nn.Module):
    """Three hidden layers, no normalisation."""

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(len(x), -1)
        for i in range(3):
            dense = nn.Dense(64, kernel_init=nn.initializers.glorot_normal(), name=f"dense{i + 1}")
            x = nn.sigmoid(dense(x))
        return nn.Dense(10, name="head")(x)


sigmoid_net = SigmoidNet()
resnet = make_model("resnet8", num_classes=10, norm_momentum=0.5)

# %% [markdown]
# ## Training that looks at every layer
#
# After each step the gradient of the same batch is taken once more, at the new weights:
# $L_k \approx \|g_k(w + \Delta) - g_k(w)\| / \|\Delta_k\|$ along the update $\Delta$, of all layers
# together. `frozen` steps leave the last, fully connected, layer as it is.


# %%
def optimizer(name, learning_rate, num_steps, warmup=0):
    schedule = make_schedule(
        "polynomial", peak=learning_rate, end=0.0, warmup_steps=warmup, num_steps=num_steps
    )
    options = {"momentum": 0.9, "nesterov": False, "weight_decay": 0.0, "group_size": 1}
    options |= {"trust_coefficient": None, "max_trust_ratio": None}
    made = make_optimizer(name, schedule, batch_size=BATCH, num_steps=num_steps, **options)
    return made.transformation


def norm(tree):
    return jax.tree.map(lambda leaf: jnp.linalg.norm(leaf.ravel()), tree)


def train(net, tx, num_steps, seed=0, frozen=0):
    def loss_fn(params, x, y, stats):
        variables = {"params": params, "batch_stats": stats}
        logits, new = net.apply(variables, x, train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, new.get("batch_stats", {})

    gradient = clars_optax.value_and_grad_and_norms(loss_fn, has_aux=True, batch_argnums=(1, 2))

    @jax.jit
    def step(params, stats, state, x, y, is_frozen):
        (loss, new_stats), grads, norms = gradient(params, x, y, stats)
        updates, state = tx.update(grads, state, params, example_grad_norms=norms)
        updates["head"] = jax.tree.map(lambda u: u * (1 - is_frozen), updates["head"])
        new_params = optax.apply_updates(params, updates)
        new_grads, _ = jax.grad(loss_fn, has_aux=True)(new_params, x, y, stats)
        change = jax.tree.map(jnp.subtract, new_grads, grads)
        record = {
            "M": clars_optax.diagnostics(params, grads, norms, batch_size=BATCH).variance_factor,
            "L": jax.tree.map(jnp.divide, norm(change), norm(updates)),
            "LARS": jax.tree.map(jnp.divide, norm(params), norm(grads)),
            "CLARS": jax.tree.map(lambda w, n: w / n.mean(), norm(params), norms),
        }
        return new_params, new_stats, state, loss, record

    variables = net.init(jax.random.key(seed), x[:1], train=False)
    params, stats = variables["params"], variables.get("batch_stats", {})
    state, losses, records = tx.init(params), [], []
    for i in range(num_steps):
        if i % 2 == 0:
            order = np.random.default_rng((seed, i)).permutation(len(x)).reshape(2, BATCH)
        batch = order[i % 2]
        params, stats, state, loss, record = step(
            params, stats, state, x[batch], y[batch], jnp.float32(i < frozen)
        )
        losses.append(loss)
        records.append(record)
    # The mean over the two steps of each epoch.
    history = jax.tree.map(lambda *values: np.reshape(values, (-1, 2)).mean(1), *records)
    return np.array(losses), {name: flatten_dict(tree, sep="/") for name, tree in history.items()}


# %% [markdown]
# ## A network on which warm-up matters
#
# Five ways to train the sigmoid network with the same momentum and the same falling schedule, 200
# steps, three seeds each. SGD's rate of 2 is too much for the first steps: the sigmoids saturate,
# the loss stays near that of guessing, $\ln 10 = 2.30$, and never leaves it. A warm-up of 40 steps
# prevents that. So does freezing the last layer in these 40 steps and nothing else. LARS and CLARS
# start at their full rate, and end below 0.1 as well.

# %%
STEPS, WARMUP = 200, 40
ways = {
    "SGD": {"tx": optimizer("sgd", 2.0, STEPS)},
    "SGD, warm-up": {"tx": optimizer("sgd", 2.0, STEPS, WARMUP)},
    "SGD, last layer frozen": {"tx": optimizer("sgd", 2.0, STEPS), "frozen": WARMUP},
    "LARS": {"tx": optimizer("lars", 16.0, STEPS)},
    "CLARS": {"tx": optimizer("clars", 16.0, STEPS)},
}
fig, ax = plt.subplots(figsize=(8, 4), layout="constrained")
sigmoid = {}
for i, (name, options) in enumerate(ways.items()):
    curves = []
    for seed in range(3):
        losses, sigmoid[name] = train(sigmoid_net, num_steps=STEPS, seed=seed, **options)
        curves.append(losses)
        ax.plot(losses, color=f"C{i}", label=name if seed == 0 else None, alpha=0.8)
    print(f"{name:24}" + "".join(f"{losses[-1]:8.3f}" for losses in curves))
ax.axvspan(0, WARMUP, color="lightgrey", alpha=0.4, label="warm-up")
ax.set(xlabel="step", ylabel="loss", yscale="log")
ax.legend()
plt.show()

# %% [markdown]
# ## $M_k$, $L_k$ and the rates of every layer and epoch
#
# Of the sigmoid network, trained by SGD with warm-up, and of a ResNet with BatchNorm, trained by
# CLARS without. The rates are $\|w_k\| / \|g_k\|$ for LARS and $\|w_k\| / \frac{1}{N} \sum_i
# \|g_{k,i}\|$ for CLARS, before the trust coefficient and the cap.

# %%
losses, of_resnet = train(resnet, optimizer("clars", 4.0, 40), 40)
print(f"ResNet-8, CLARS: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
of_sigmoid = sigmoid["SGD, warm-up"]


def draw(ax, history):
    kernels = [name for name in history if name.endswith("kernel")]
    for name, colour in zip(
        kernels, plt.cm.viridis(np.linspace(0, 0.9, len(kernels))), strict=True
    ):
        epochs = np.arange(1, len(history[name]) + 1)
        ax.plot(epochs, history[name], color=colour, label=name.removesuffix("/kernel"))
    ax.set(xlabel="epoch", yscale="log")


titles = {"M": "$M_k$", "L": "$L_k$", "LARS": "rates of LARS", "CLARS": "rates of CLARS"}
fig, axes = plt.subplots(2, 4, figsize=(15, 7), layout="constrained")
for row, (name, history) in zip(
    axes, (("sigmoid", of_sigmoid), ("ResNet-8", of_resnet)), strict=True
):
    for ax, (quantity, title) in zip(row, titles.items(), strict=True):
        draw(ax, history[quantity])
        ax.set_title(f"{title}, {name}")
    row[-1].legend(fontsize="x-small")
plt.show()
print("L_k, epochs 1, 3 and 6:")
for name, history in (("sigmoid", of_sigmoid), ("ResNet-8", of_resnet)):
    for layer in ("dense1", "head", "stem_conv"):
        if f"{layer}/kernel" in history["L"]:
            first, third, sixth = history["L"][f"{layer}/kernel"][[0, 2, 5]]
            print(f"{name:10}{layer:12}{first:8.3f}{third:8.3f}{sixth:8.3f}")

# %% [markdown]
# In both networks the gradient of every layer changes fastest in the first epochs: in the ResNet
# $L_k$ falls to less than a quarter within six epochs, in the last layer to less than a tenth. A
# rate that is right later is too large then, which is what a warm-up is for. And the last layer's
# $L_k$ is among the largest, which is why freezing it helped.
#
# The variance factor $M_k$ is large from the start, and rises as the examples are learned. In these
# two runs it is not larger in the first epochs than later.
#
# ## Three techniques in pictures
#
# How each technique sets the rates of the ResNet's layers over the run, beside $1 / L_k$, which an
# ideal rate would follow. Linear scaling gives all layers the same rate, in proportion to the batch
# size; gradual warm-up lets it rise to there. LARS and CLARS give each layer its own, here without
# the trust coefficient and the cap.

# %%
fig, axes = plt.subplots(1, 4, figsize=(15, 4), layout="constrained")
epochs = np.arange(1, 21)
for batch_size, shade in ((64, 0.4), (640, 1.0)):
    rate = 0.1 * batch_size / 256
    label = f"{batch_size} images per step"
    axes[0].plot(epochs, np.full(20, rate), color="C0", alpha=shade, label=label)
axes[0].plot(epochs, np.minimum(epochs / 5, 1) * rate, color="C0", ls="--", label="with warm-up")
axes[0].set(title="linear scaling, gradual warm-up", xlabel="epoch", ylabel="rate")
axes[0].legend(fontsize="x-small")
draw(axes[1], of_resnet["LARS"])
axes[1].set_title(r"LARS: $\|w_k\| / \|g_k\|$")
draw(axes[2], of_resnet["CLARS"])
axes[2].set_title(r"CLARS: $\|w_k\| / \frac{1}{N} \sum_i \|g_{k,i}\|$")
draw(axes[3], {name: 1 / values for name, values in of_resnet["L"].items()})
axes[3].set_title("$1 / L_k$")
axes[3].legend(fontsize="x-small")
plt.show()

kernels = [name for name in of_resnet["L"] if name.endswith("kernel")]
print("rank correlation of the layers' rates with 1 / L_k, epochs 1 to 6")
for name in ("LARS", "CLARS"):
    correlations = [
        spearmanr(
            [of_resnet[name][kernel][epoch] for kernel in kernels],
            [1 / of_resnet["L"][kernel][epoch] for kernel in kernels],
        ).statistic
        for epoch in range(6)
    ]
    print(f"{name:6}" + "".join(f"{c:7.2f}" for c in correlations))

# %% [markdown]
# In the first six epochs both orders of the layers are nearly that of $1 / L_k$, with rank
# correlations above 0.6: layers whose gradient changes fast get small steps. This is how a
# layer-wise rate can stand in for a warm-up. It does not say that CLARS reaches a better accuracy:
# for that see the study in `compare_optimizers.ipynb`.
