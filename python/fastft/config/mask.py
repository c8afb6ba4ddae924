"""Hides what must never be printed or saved: tokens, and the user and password inside a URL.

Used by everything that shows a config and by everything that is said (`console`): no field of the schema holds a token, but
a name may be a URL, and what a library complains of may quote a token from the environment.
"""

import os
import re

HIDDEN = "***"
# Variables of the hubs and loggers that hold a secret.
VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_TOKEN",
    "MODELSCOPE_API_TOKEN",
    "MODELSCOPE_SDK_TOKEN",
    "MODELSCOPE_TOKEN",
    "WANDB_API_KEY",
)
# A shorter value is a word, not a secret, and hiding it would eat words out of messages.
_LEAST_SECRET = 8

# The lengths are bounded: without, a long text takes the square of its length.
_CREDENTIALS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,30}://)[^/@\s]{1,1000}@")
# Tokens of Hugging Face (hf_, api_org_), ModelScope (ms-UUID), GitHub, OpenAI and AWS, and what follows `Bearer`.
TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|hf_oauth_[A-Za-z0-9._-]{16,}|api_org_[A-Za-z0-9]{16,}"
    r"|ms-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
    r"|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16})"
)
_BEARER = re.compile(r"(?P<word>\b[Bb]earer\s+)[A-Za-z0-9._~+/=-]{8,}")
_SIGNATURE = re.compile(r"(?P<key>[?&](?:X-Amz-Signature|X-Amz-Credential|Signature|access_token|token)=)[^&\s'\"]+")


def masked(text: str) -> str:
    """`text` with `https://user:password@host` as `https://***@host`, and every token that can be told as `***`."""
    for value in secrets():
        text = text.replace(value, HIDDEN)
    text = _CREDENTIALS.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = TOKEN.sub(HIDDEN, text)
    text = _BEARER.sub(rf"\g<word>{HIDDEN}", text)
    return _SIGNATURE.sub(rf"\g<key>{HIDDEN}", text)


def secrets() -> list[str]:
    """The secrets in the environment, the longest first (one may hold another)."""
    found = {os.environ.get(name, "").strip() for name in VARIABLES}
    return sorted((value for value in found if len(value) >= _LEAST_SECRET), key=len, reverse=True)
