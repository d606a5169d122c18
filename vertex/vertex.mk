# Vertex AI, by the settings of one file.
VERTEX_ENV ?= vertex/vertex.env
