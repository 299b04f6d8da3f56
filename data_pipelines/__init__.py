"""From manifests and media to packed rows. Depends on `baichuan_omni_jax.config` alone and never imports jax."""
