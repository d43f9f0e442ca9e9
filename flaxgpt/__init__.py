"""GPT-2 as pure functions: JAX, Flax, Optax. Import the module you need; nothing heavy loads from here."""
