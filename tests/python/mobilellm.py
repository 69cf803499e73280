"""MobileLLM (arXiv:2402.14905), for which transformers has no class: the published models bring code of their own. It is Llama, but
the stream goes through each block twice where the config says `layer_sharing`, and the head is the embedding where it says
`share_embedding`.

Here each pass has a place of its own in the cache, without which generating with one is not what it is without.
"""

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


@strict
class MobileLlmConfig(LlamaConfig):
    """Llama's, and what may be shared."""

    model_type = "mobilellm"
    layer_sharing: bool = False
    share_embedding: bool = False

    def __post_init__(self, **kwargs):
        self.tie_word_embeddings = self.tie_word_embeddings or self.share_embedding
        super().__post_init__(**kwargs)


class Twice(LlamaDecoderLayer):
    """A block that is gone through twice."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.places = (layer_idx, layer_idx + config.num_hidden_layers)

    def forward(self, hidden_states, **rest):
        for place in self.places:
            self.self_attn.layer_idx = place
            hidden_states = super().forward(hidden_states, **rest)
        return hidden_states


class MobileLlm(LlamaForCausalLM):
    """The model."""

    config_class = MobileLlmConfig

    def __init__(self, config):
        super().__init__(config)
        if config.layer_sharing:
            self.model.layers = nn.ModuleList(Twice(config, index) for index in range(config.num_hidden_layers))
        self.post_init()

    def generate(self, *arguments, **options):
        # One made from the config would have a place for each block only.
        return super().generate(*arguments, past_key_values=DynamicCache(), **options)


AutoConfig.register("mobilellm", MobileLlmConfig)
AutoModelForCausalLM.register(MobileLlmConfig, MobileLlm)
