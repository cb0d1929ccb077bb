"""Ray Serve LLM: sessions placed on its replicas as the router places them on its backends."""
