"""The embedded model and data of `fastft train demo`, with the code that made them.

`words` (lists) -> `stories`, `village`, `notes` (one kind of text each) -> `corpus` (what the base reads) ;
`dialogues` (what the fine-tuning teaches, and how to see that it was learned) -> `generate` (writes the files) ;
`tokenizer` -> `make` (trains `base/` from scratch with fastft itself).
All text is written for this project by these templates and is under the project's licence, Apache-2.0.
"""
