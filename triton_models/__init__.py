"""The server side: target model, KV memory, Triton Python backend, launcher."""
