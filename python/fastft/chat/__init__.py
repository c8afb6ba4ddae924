"""Talk to a model: `session` loads it and answers, `repl` is the conversation at the terminal."""
