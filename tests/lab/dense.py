"""A Llama written down once more, in float64, head by head, from the weights' names alone.

What the laboratory and the programs in examples/study compute is held to this. It knows none of
the package's modules.
"""

import torch


def no_change(site, layer, value):
    return value


class Dense:
    """One sequence at a time: rows (T, C) → logits (T, V), rows behind layers, shares (H, T, T)."""

    def __init__(self, lab):
        self.weights = {
            name.removeprefix("language."): weight.detach().double()
            for name, weight in lab.weights.items()
            if name.startswith("language.")
        }
        self.config = lab.config.language

    def norm(self, rows, name):
        mean_square = rows.pow(2).mean(-1, keepdim=True)
        return rows / (mean_square + self.config.rms_norm_eps).sqrt() * self.weights[name]

    def turn(self, heads):
        """(T, D) of one head, turned by their positions."""
        half = self.config.head_dim // 2
        speeds = self.config.rope_theta ** (-torch.arange(half).double() / half)
        angles = torch.arange(len(heads)).double()[:, None] * speeds
        first, second = heads[:, :half], heads[:, half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], 1)

    def attend(self, normed, layer, change):
        c, at = self.config, f"layers.{layer}.attention"
        q, k, v = (
            (normed @ self.weights[f"{at}.{name}.weight"].T).split(c.head_dim, dim=1)
            for name in ("query", "key", "value")
        )
        shared = c.num_attention_heads // c.num_key_value_heads
        scores = torch.stack([
            self.turn(q[h]) @ self.turn(k[h // shared]).T / c.head_dim**0.5
            for h in range(c.num_attention_heads)
        ])  # fmt: skip
        scores = change("scores", layer, scores)
        future = torch.ones(len(normed), len(normed)).triu(1).bool()
        shares = scores.masked_fill(future, float("-inf")).softmax(-1)
        heads = [shares[h] @ v[h // shared] for h in range(c.num_attention_heads)]
        heads = change("heads", layer, torch.stack(heads, 1))
        return heads.flatten(1) @ self.weights[f"{at}.out.weight"].T, shares

    def run(self, rows, change=no_change):
        rows = rows.double()
        hidden, shares = [rows], []
        for layer in range(self.config.num_hidden_layers):
            at = f"layers.{layer}"
            added, looked = self.attend(
                self.norm(rows, f"{at}.attention_norm.weight"), layer, change
            )
            rows = rows + change("attention", layer, added)
            normed = self.norm(rows, f"{at}.mlp_norm.weight")
            gate, up = (
                normed @ self.weights[f"{at}.mlp_{name}.weight"].T for name in ("gate", "up")
            )
            added = (gate * gate.sigmoid() * up) @ self.weights[f"{at}.mlp_down.weight"].T
            rows = change("residual", layer, rows + change("feed_forward", layer, added))
            hidden.append(rows)
            shares.append(looked)
        return self.logits(rows), torch.stack(hidden), torch.stack(shares)

    def logits(self, rows):
        return self.norm(rows, "norm.weight") @ self.weights["head.weight"].T

    def embed(self, token_ids):
        return self.weights["token_embedding.weight"][torch.as_tensor(token_ids)]

    def rows_of(self, prompt, image_rows, answer=()):
        """A prompt's words, (N, R, C) rows in the place of its pictures, and an answer's words."""
        vocab_size = len(self.weights["token_embedding.weight"])
        ids = [min(i, vocab_size - 1) for i in (*prompt.token_ids, *answer)]
        rows = self.embed(ids).clone()
        for span, shown in zip(prompt.image_spans, image_rows, strict=True):
            rows[span.start : span.start + span.num_rows] = shown.double()
        return rows

    def greedy(self, step, count, eos_id):
        """Ids from `step(ids so far) → (V,) scores`."""
        ids = []
        while len(ids) < count and eos_id not in ids:
            ids.append(int(step(ids).argmax()))
        return ids
