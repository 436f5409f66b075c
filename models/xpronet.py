"""XProNet: a cross-modal network that reads prototypes of a study's labels (Wang et al., ECCV 2022, arXiv 2207.04818).

Shapes: B studies, S visual tokens of all views, T decoder inputs, K hypotheses per study, d = d_model, C classes,
M = C * num_protype prototypes (class c in rows c * num_protype onwards).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Backbone, Output, VisualFeatures
from modules.decoding.cache import DecodingCache
from modules.decoding.options import DecodingOptions
from modules.layers.prototypes import PrototypeResponse, label_contrastive_loss, prototypes_of, with_no_finding
from modules.layers.transformer import Decoder, Encoder, PositionalEncoding, TokenEmbedding, decoder_mask
from modules.layers.transformer_patches import PatchEmbedding

LABEL_SOURCES = ("predicted", "reference")


@dataclass
class Prototypes:
    """The projected prototypes of a pass, and which of them each study reads."""

    keys: Tensor  # (h, M, w)
    values: Tensor  # (h, M, w)
    selected: Tensor  # (B, M) bool


class Transformer(nn.Module):
    """Encoder, decoder, embeddings and the text's fusion; ``cmn`` is the caller's, registered again as published."""

    def __init__(
        self,
        num_ids: int,
        *,
        d_model: int,
        d_ff: int,
        num_heads: int,
        num_layers: int,
        dropout: float,
        cmn: PrototypeResponse,
    ):
        super().__init__()
        self.encoder = Encoder(d_model, num_heads, d_ff, num_layers, dropout)
        self.decoder = Decoder(d_model, num_heads, d_ff, num_layers, dropout)
        self.src_embed = nn.Sequential(PositionalEncoding(d_model, dropout))
        self.tgt_embed = nn.Sequential(TokenEmbedding(num_ids, d_model), PositionalEncoding(d_model, dropout))
        self.cmn = cmn
        self.fuse_feature = nn.Linear(2 * d_model, d_model)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)


class EncoderDecoder(nn.Module):
    """Patch features and tokens to hidden states; both read the prototypes, and a linear layer fuses the response."""

    def __init__(
        self,
        image_dim: int,
        num_ids: int,
        *,
        num_prototypes: int,
        prototype_dim: int,
        d_model: int,
        d_ff: int,
        num_heads: int,
        num_layers: int,
        dropout: float,
        drop_prob_lm: float,
        use_bn: int,
        topk: int,
    ):
        super().__init__()
        self.protypes = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_prototypes, prototype_dim)))
        self.att_embed = PatchEmbedding(image_dim, d_model, drop_prob_lm, use_bn)
        self.dim_reduction = nn.Linear(prototype_dim, d_model)
        self.fuse_feature = nn.Linear(2 * d_model, d_model)
        self.cmn = PrototypeResponse(d_model, num_heads, topk)
        self.model = Transformer(
            num_ids,
            d_model=d_model,
            d_ff=d_ff,
            num_heads=num_heads,
            num_layers=num_layers,
            dropout=dropout,
            cmn=self.cmn,
        )
        self.logit = nn.Linear(d_model, num_ids)

    def prototypes(self, labels: Tensor) -> Prototypes:
        """The prototypes for studies with multi-hot ``labels`` (B, C), each row with a positive."""
        keys, values = self.cmn.keys_values(self.dim_reduction(self.protypes))
        return Prototypes(keys, values, prototypes_of(labels, len(self.protypes)))

    def encode(self, features: VisualFeatures, prototypes: Prototypes) -> tuple[Tensor, Tensor]:
        """Encoder output and response, (B, S, d) each: prototypes are read before positions are added."""
        x = self.att_embed(features.patches, features.patch_mask)
        response = self.cmn(x, prototypes.keys, prototypes.values, prototypes.selected)
        fused = self.fuse_feature(torch.cat([x, response], dim=-1))
        return self.model.encoder(self.model.src_embed[0](fused), features.attention_mask), response

    def embed(self, tokens: Tensor, prototypes: Prototypes, position: int | None = None) -> tuple[Tensor, Tensor]:
        """Decoder input and response, (B, T, d) each: prototypes are read after positions are added."""
        x = self.model.tgt_embed[1](self.model.tgt_embed[0](tokens), position)
        response = self.cmn(x, prototypes.keys, prototypes.values, prototypes.selected)
        return self.model.fuse_feature(torch.cat([x, response], dim=-1)), response

    def decode(
        self, tokens: Tensor, encoded: Tensor, prototypes: Prototypes, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states and response, (B, T, d) each, under teacher forcing; ``mask`` (B, 1, 1, S) or None."""
        x, response = self.embed(tokens, prototypes)
        decoder = self.model.decoder
        return decoder(x, decoder.source_keys_values(encoded), decoder_mask(tokens), mask), response

    def log_probs(self, hidden: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, V+1) in float32."""
        return F.log_softmax(self.logit(hidden), dim=-1, dtype=torch.promote_types(hidden.dtype, torch.float32))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # The shared response module stands in published files under two names; one of them is enough.
        names = (prefix + "cmn.", prefix + "model.cmn.")
        for own, other in (names, names[::-1]):
            for key in [key for key in state_dict if key.startswith(own)]:
                state_dict.setdefault(other + key.removeprefix(own), state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args)


class XProNet(Backbone):
    """The published model and, beside it, a classification head that predicts the labels from the image.

    ``num_ids`` = V+1 rows of embedding and logits, ``visual_extractor`` has ``width``. ``num_cluster`` classes have
    ``num_protype`` prototypes each; ``no_finding`` is the class of a study without a positive label.
    ``init_prototypes`` (M, d_img_ebd + d_txt_ebd) starts the prototypes, None draws them. ``weight_img_con_loss``,
    ``weight_txt_con_loss`` and ``label_loss_weight`` (binary cross entropy of the head) weigh the auxiliary losses.

    In training the given labels choose the prototypes. In generation they are the head's, a probability above one
    half being positive: the given ones come from the reference report, and are used only where ``xpronet_labels`` is
    "reference", as the published code does. ValueError for options that do not go together.
    """

    needs_labels = True

    flags = (
        *Backbone.flags,
        "topk",
        "num_cluster",
        "num_protype",
        "d_img_ebd",
        "d_txt_ebd",
        "weight_img_con_loss",
        "weight_txt_con_loss",
        "img_con_margin",
        "txt_con_margin",
        "xpronet_labels",
        "label_loss_weight",
    )

    def __init__(
        self,
        *,
        visual_extractor: nn.Module,
        num_ids: int,
        no_finding: int,
        num_cluster: int = 14,
        num_protype: int = 20,
        d_img_ebd: int = 2048,
        d_txt_ebd: int = 768,
        topk: int = 15,
        init_prototypes: Tensor | None = None,
        xpronet_labels: str = "predicted",
        weight_img_con_loss: float = 1.0,
        weight_txt_con_loss: float = 1.0,
        img_con_margin: float = 0.4,
        txt_con_margin: float = 0.4,
        label_loss_weight: float = 1.0,
        d_model: int = 512,
        d_ff: int = 512,
        num_heads: int = 8,
        num_layers: int = 3,
        dropout: float = 0.1,
        drop_prob_lm: float = 0.5,
        use_bn: int = 0,
    ):
        super().__init__()
        num_prototypes, prototype_dim = num_cluster * num_protype, d_img_ebd + d_txt_ebd
        if topk > num_prototypes:
            raise ValueError(
                f"topk {topk}: num_cluster {num_cluster} times num_protype {num_protype} are only "
                f"{num_prototypes} prototypes"
            )
        if xpronet_labels == "predicted" and not label_loss_weight:
            raise ValueError(
                "label_loss_weight 0 trains no predicted labels: give it a weight, or --xpronet_labels reference"
            )
        if not 0 <= no_finding < num_cluster:
            raise ValueError(f"no_finding {no_finding}: must be one of the {num_cluster} clusters, from 0")
        if xpronet_labels not in LABEL_SOURCES:
            raise ValueError(f"xpronet_labels {xpronet_labels!r}: expected one of {', '.join(LABEL_SOURCES)}")
        self.visual_extractor = visual_extractor
        self.image_dim = visual_extractor.width
        self.report_dim = d_model
        self.no_finding, self.xpronet_labels = no_finding, xpronet_labels
        self.weight_img_con_loss, self.img_con_margin = weight_img_con_loss, img_con_margin
        self.weight_txt_con_loss, self.txt_con_margin = weight_txt_con_loss, txt_con_margin
        self.label_loss_weight = label_loss_weight
        self.encoder_decoder = EncoderDecoder(
            self.image_dim,
            num_ids,
            num_prototypes=num_prototypes,
            prototype_dim=prototype_dim,
            d_model=d_model,
            d_ff=d_ff,
            num_heads=num_heads,
            num_layers=num_layers,
            dropout=dropout,
            drop_prob_lm=drop_prob_lm,
            use_bn=use_bn,
            topk=topk,
        )
        self.label_head = nn.Linear(self.image_dim, num_cluster)
        if init_prototypes is not None:
            with torch.no_grad():
                self.encoder_decoder.protypes.copy_(init_prototypes)

    def forward(self, images, tokens, *, view_mask=None, labels=None, features=None, supervised_rows=None) -> Output:
        """As in the contract; without ``labels``, which training needs, those that the head predicts are used."""
        if labels is None and self.training:
            raise ValueError("XProNet is trained with labels: every study needs a row of them")
        features = self.extract(images, view_mask, features)
        logits = self.label_head(features.pooled)  # (B, C)
        used = self._complete(logits > 0 if labels is None else labels)
        network = self.encoder_decoder
        prototypes = network.prototypes(used)
        encoded, image_response = network.encode(features, prototypes)
        hidden, text_response = network.decode(tokens, encoded, prototypes, features.attention_mask)
        auxiliary = {}
        rows = len(tokens) if supervised_rows is None else supervised_rows
        if labels is not None and rows:
            auxiliary = self._auxiliary(
                used[:rows],
                logits[:rows],
                mean_over_tokens(
                    image_response[:rows], None if features.patch_mask is None else features.patch_mask[:rows]
                ),
                mean_over_tokens(text_response[:rows], own_columns(tokens[:rows])),
            )
        return Output(network.log_probs(hidden[:supervised_rows]), features.pooled, hidden, auxiliary)

    def encode(self, features: VisualFeatures) -> tuple[Tensor, ...]:
        """The encoder's output (B, S, d) and the labels (B, C) that the head predicts."""
        labels = self._complete(self.label_head(features.pooled) > 0)
        return self.encoder_decoder.encode(features, self.encoder_decoder.prototypes(labels))[0], labels

    def next_words(self, tokens: Tensor, *encoded: Tensor) -> Tensor:
        network, (states, labels) = self.encoder_decoder, encoded
        return network.log_probs(network.decode(tokens, states, network.prototypes(labels), None)[0])

    def _complete(self, labels: Tensor) -> Tensor:
        return with_no_finding(labels.to(self.label_head.weight.dtype), self.no_finding)

    def _auxiliary(
        self, labels: Tensor, logits: Tensor, image_response: Tensor, text_response: Tensor
    ) -> dict[str, Tensor]:
        """Weighted losses of the responses (B, d) and of the head's logits (B, C)."""
        losses = {}
        if self.weight_img_con_loss:
            loss = label_contrastive_loss(image_response, labels, self.img_con_margin)
            losses["img_con"] = self.weight_img_con_loss * loss
        if self.weight_txt_con_loss:
            loss = label_contrastive_loss(text_response, labels, self.txt_con_margin)
            losses["txt_con"] = self.weight_txt_con_loss * loss
        if self.label_loss_weight:
            loss = F.binary_cross_entropy_with_logits(logits.to(labels.dtype), labels)
            losses["label"] = self.label_loss_weight * loss
        return losses

    def cross_attention(self) -> list[nn.Module]:
        return [layer.src_attn for layer in self.encoder_decoder.model.decoder.layers]

    def session(self, features: VisualFeatures, labels: Tensor | None, decoding: DecodingOptions) -> "Session":
        """Prototypes are chosen by the labels that the image predicts, or by the given ones with "reference"."""
        if self.xpronet_labels == "predicted":
            labels = self.label_head(features.pooled) > 0
        elif labels is None:
            raise ValueError("xpronet_labels 'reference': generation needs the labels of every study")
        return Session(self.encoder_decoder, features, self._complete(labels), decoding)

    def check_missing(self, names: list[str]) -> None:
        without_head = [name for name in names if not name.startswith("label_head.")]
        super().check_missing(without_head)
        if len(names) > len(without_head) and self.xpronet_labels == "predicted":
            raise ValueError(
                "it has no label head, as the published ones, so labels cannot be predicted from images: "
                "give --xpronet_labels reference and --label_path"
            )


def mean_over_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, d) -> (B, d), over the tokens where ``mask`` (B or 1, T) bool is true."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if mask is None:
        return x.mean(dim=1)
    kept = mask.unsqueeze(-1).to(x.dtype)
    return (x * kept).sum(dim=1) / kept.sum(dim=1)


def own_columns(tokens: Tensor) -> Tensor:
    """(1, T) bool: columns up to the last word of any row of ``tokens`` (B, T).

    The published text loss averages over padding as well, but not over that which came by joining a batch with its
    hard negatives.
    """
    has_word = (tokens > 0).any(dim=0)
    has_word[0] = True
    return has_word.flip(0).cummax(dim=0).values.flip(0).unsqueeze(0)


class Session:
    """The decoder with everything that stays the same, or is kept, between two tokens of a batch of studies."""

    def __init__(self, network: EncoderDecoder, features: VisualFeatures, labels: Tensor, decoding: DecodingOptions):
        self.network = network
        self.prototypes = network.prototypes(labels)
        encoded, _ = network.encode(features, self.prototypes)
        self.sources = network.model.decoder.source_keys_values(encoded)
        self.source_mask = features.attention_mask
        self.cache = DecodingCache(len(self.sources), decoding.max_seq_length, decoding.num_hypotheses)

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """Log-probabilities (B, K, V+1) after ``tokens`` (B, K), which continue hypotheses ``parents`` (B, K).

        A study's hypotheses stand side by side as queries, so that they share its keys and prototypes without a copy.
        """
        mask = self.cache.advance(tokens, parents)
        x, _ = self.network.embed(tokens, self.prototypes, self.cache.position)
        hidden = self.network.model.decoder(x, self.sources, mask, self.source_mask, self.cache.layers)
        return self.network.log_probs(hidden)

    def keep(self, rows: Tensor) -> None:
        """Go on with the studies ``rows`` (int64 indices) only."""
        self.sources = [(keys[rows], values[rows]) for keys, values in self.sources]
        self.source_mask = None if self.source_mask is None else self.source_mask[rows]
        self.prototypes.selected = self.prototypes.selected[rows]
        self.cache.keep(rows)
