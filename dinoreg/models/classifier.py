"""A supervised classifier with register tokens (Darcet et al. 2023, the label-supervised setting of §3.1).

The same blocks as the encoder, trained from scratch on labels: images in, class logits out.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoreg.models.attention import check_backend, compute_dtype, resolve_backend
from dinoreg.models.layers import NORM_EPS, Block, PatchEmbed, init_linear_layers
from dinoreg.models.vit import as_pair, patch_grid
from dinoreg.runtime.errors import UserError

INIT_STD = 0.02


class VitRGTS(nn.Module):
    """Vision Transformer with register tokens and a linear classifier.

    image_size   pixels, (height, width) or one for both; the patch size must divide both
    patch_size   pixels, height and width of a patch
    dim_head     width of one attention head; heads * dim_head may differ from dim
    mlp_dim      hidden width of the feed-forward layers
    pool         what is classified: "cls", the class token, or "mean", the mean of the patch tokens
    dropout      probability in [0, 1], after the attention's projection and after both feed-forward layers
    emb_dropout  probability in [0, 1], on the sequence that enters the first block
    attention    "auto" | "xformers" | "varlen" | "sdpa" | "plain"
    raises       UserError for sizes that do not fit, an unknown pool or attention, depth < 1, negative registers
    """

    def __init__(
        self,
        *,
        image_size: int | Sequence[int],
        patch_size: int,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        num_register_tokens: int = 4,
        pool: str = "cls",
        channels: int = 3,
        dim_head: int = 64,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        self.image_size = as_pair(image_size, "image_size")
        rows, columns = patch_grid(self.image_size, patch_size)
        if pool not in ("cls", "mean"):
            raise UserError(f"pool={pool!r} is not known; expected 'cls' or 'mean'")
        if num_register_tokens < 0 or depth < 1:
            raise UserError(f"num_register_tokens={num_register_tokens}, depth={depth}: expected >= 0, >= 1")
        self.pool, self.emb_dropout = pool, emb_dropout
        self.num_register_tokens = num_register_tokens
        self.attention_backend = check_backend(attention)
        self.patch_embed = PatchEmbed(patch_size, channels, dim)
        self.pos_embed = nn.Parameter(torch.empty(1, rows * columns, dim))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_tokens = nn.Parameter(torch.empty(1, num_register_tokens, dim))
        self.blocks = nn.ModuleList(
            Block(dim, heads, hidden_dim=mlp_dim, layerscale=None, head_dim=dim_head, dropout=dropout)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.head = nn.Linear(dim, num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw new weights from torch's global generator: truncated normal, standard deviation 0.02; biases are 0."""
        init_linear_layers(self, INIT_STD)
        for tokens in (self.pos_embed, self.cls_token, self.register_tokens):
            nn.init.trunc_normal_(tokens, std=INIT_STD)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        images  (B, C, H, W)       of the model's own size
        returns (B, num_classes)   logits
        raises                     UserError for images of another size or number of channels
        """
        if tuple(images.shape[2:]) != self.image_size:
            raise UserError(f"images are {tuple(images.shape[2:])} pixels, the model is for {self.image_size}")
        patches = self.patch_embed(images) + self.pos_embed
        batch = images.shape[0]
        x = torch.cat(
            [self.cls_token.expand(batch, -1, -1), self.register_tokens.expand(batch, -1, -1), patches], dim=1
        )  # (B, T, D)
        x = F.dropout(x, self.emb_dropout, self.training)
        shapes = (tuple(x.shape[:2]),)
        backends = (resolve_backend(self.attention_backend, x.device, x.shape[1], compute_dtype(x)),)
        tokens = x.flatten(0, 1)
        for block in self.blocks:
            tokens = block(tokens, shapes, backends)
        x = self.norm(tokens).unflatten(0, shapes[0])
        pooled = x[:, 0] if self.pool == "cls" else x[:, 1 + self.num_register_tokens :].mean(dim=1)
        return self.head(pooled)
