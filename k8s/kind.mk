# A cluster in Docker on this machine: kind-config.yaml.
KIND_URL := http://127.0.0.1:8080
METRICS_SERVER := https://github.com/kubernetes-sigs/metrics-server/releases/download/v0.8.1/components.yaml
# This cluster, whatever the current context is.
KIND_KUBECTL := kubectl --context kind-kennel
KIND_IMAGES = kennel/gateway:$(VERSION) kennel/model-server:$(VERSION)

.PHONY: kind-tools
kind-tools:
	@command -v $(DOCKER) >/dev/null || { echo "needs Docker: https://docs.docker.com/get-docker/" >&2; exit 1; }
	@command -v kind >/dev/null || { echo "needs kind 0.32 or later: https://kind.sigs.k8s.io/docs/user/quick-start/#installation," \
	  "or go install sigs.k8s.io/kind@v0.32.0" >&2; exit 1; }
	@command -v kubectl >/dev/null || { echo "needs kubectl: https://kubernetes.io/docs/tasks/tools/" >&2; exit 1; }

.PHONY: kind-up
kind-up: kind-tools ## a cluster in Docker on this machine, with ingress and metrics
	@kind get clusters 2>/dev/null | grep -qx kennel || kind create cluster --config kind-config.yaml --wait 3m
	@$(KIND_KUBECTL) apply -f $(METRICS_SERVER)
	@# kind's kubelets sign their certificates themselves.
	@$(KIND_KUBECTL) -n kube-system patch deployment metrics-server --type=json \
	  -p '[{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": "--kubelet-insecure-tls"}]'
	@$(KIND_KUBECTL) apply -f k8s/overlays/kind/traefik.yaml
	@$(KIND_KUBECTL) -n traefik rollout status deployment/traefik --timeout=5m
	@$(KIND_KUBECTL) -n kube-system rollout status deployment/metrics-server --timeout=5m

.PHONY: kind-deploy
kind-deploy: kind-tools ## load the images that `make images` built, apply, wait until they serve
	@$(DOCKER) image inspect $(KIND_IMAGES) >/dev/null 2>&1 || { echo "no $(KIND_IMAGES): make images" >&2; exit 1; }
	@echo "Loading the images, about a minute" && kind load docker-image --name kennel $(KIND_IMAGES)
	@# The tag is the same for other content: pods that were there before start anew.
	@there=$$($(KIND_KUBECTL) -n kennel get deployments --ignore-not-found -o name 2>/dev/null); \
	$(KIND_KUBECTL) apply -k k8s/overlays/kind && \
	{ [ -z "$$there" ] || $(KIND_KUBECTL) -n kennel rollout restart $$there; }
	@$(KIND_KUBECTL) -n kennel rollout status deployment/model-server --timeout=10m
	@$(KIND_KUBECTL) -n kennel rollout status deployment/gateway --timeout=10m
	@echo "Serves at $(KIND_URL)"

.PHONY: kind-test
kind-test: kind-tools $(VENV)/dev ## a prediction through the ingress, and the cluster tests
	@mkdir -p build && $(PY) -c 'from local.run import drawing; drawing()'
	@$(PY) -m local.predict --photo build/drawing.png --url $(KIND_URL)
	@umask 077 && kind get kubeconfig --name kennel >build/kind.kubeconfig
	@KUBECONFIG=build/kind.kubeconfig KENNEL_URL=$(KIND_URL) $(PY) -m pytest tests/cluster

.PHONY: kind-down
kind-down: kind-tools ## remove the cluster
	@kind delete cluster --name kennel
