"""One file a family; see maxlm/model/family.py."""
