"""An HTTP server of the engine, with the routes of OpenAI's API and of vLLM."""
