"""HTTP: pictures in, named answers out. Knows pictures, HTTP and the manifest, never torch."""
