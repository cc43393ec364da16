"""Where token counts stand in a backend's answer: Envoy reads them there, and ext_proc does where it answers itself.

Sources: OpenAI API reference, "usage" of chat completions, completions and responses; contract, "POST /v1/inference".
"""

from __future__ import annotations

from typing import Final

from gateway import names

USAGE_PATHS: Final[tuple[tuple[tuple[str, ...], str], ...]] = (
    (("tokens_used",), names.METADATA_TOKENS_OUTPUT),
    (("usage", "prompt_tokens"), names.METADATA_TOKENS_INPUT),
    (("usage", "completion_tokens"), names.METADATA_TOKENS_OUTPUT),
    (("usage", "prompt_tokens_details", "cached_tokens"), names.METADATA_TOKENS_INPUT_CACHED),
    (("usage", "completion_tokens_details", "reasoning_tokens"), names.METADATA_TOKENS_OUTPUT_REASONING),
    (("usage", "input_tokens"), names.METADATA_TOKENS_INPUT),
    (("usage", "output_tokens"), names.METADATA_TOKENS_OUTPUT),
    (("usage", "input_tokens_details", "cached_tokens"), names.METADATA_TOKENS_INPUT_CACHED),
    (("usage", "output_tokens_details", "reasoning_tokens"), names.METADATA_TOKENS_OUTPUT_REASONING),
    (("response", "usage", "input_tokens"), names.METADATA_TOKENS_INPUT),
    (("response", "usage", "output_tokens"), names.METADATA_TOKENS_OUTPUT),
    (("response", "usage", "input_tokens_details", "cached_tokens"), names.METADATA_TOKENS_INPUT_CACHED),
    (("response", "usage", "output_tokens_details", "reasoning_tokens"), names.METADATA_TOKENS_OUTPUT_REASONING),
)
"""Path in a JSON answer or an event, and the metadata key of the count there. Of two for one key the later counts."""
TOKENS_MAX: Final = 10**9
"""A count beyond it is no count of tokens, and sums of such would not stay exact in the store."""
