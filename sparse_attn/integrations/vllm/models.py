"""The models that vLLM imports: its generic ones, whose layers are ours from then on.

On GPUs of sm_90 and newer ``--model-class-overrides`` names them beside ``--attention-backend SPARSE_ATTN``.
"""

from vllm.model_executor.models.deepseek_mtp import DeepSeekMTP as DeepseekV32MTPModel
from vllm.model_executor.models.deepseek_v2 import DeepseekV3ForCausalLM as DeepseekV32ForCausalLM
from vllm.model_executor.models.deepseek_v2 import GlmMoeDsaForCausalLM

from . import layers

__all__ = ["DeepseekV32ForCausalLM", "DeepseekV32MTPModel", "GlmMoeDsaForCausalLM"]

layers.register()
