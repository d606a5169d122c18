.PHONY: rollback
rollback: ## the model server as it was before its last change, on the current kubectl context
	@command -v kubectl >/dev/null || { echo "rollback needs kubectl: https://kubernetes.io/docs/tasks/tools/" >&2; exit 1; }
	@echo "On $$(kubectl config current-context):"
	@kubectl -n kennel rollout undo deployment/model-server
	@kubectl -n kennel rollout status deployment/model-server --timeout=10m
