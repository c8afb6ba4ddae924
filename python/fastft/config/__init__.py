"""Config files and recipe names in, one frozen `Config` out.

`schema` says what may stand in a config, `load` reads files and overrides and says where an error is, `recipes`
turns a name such as `internlm2_chat_7b_qlora_alpaca_e3` into the same thing, `show` prints it. Nothing here imports torch.
"""
