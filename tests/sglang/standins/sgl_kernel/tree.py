"""The drafted tree. Node 0 is the root; of a node the first child and the next sibling are known, -1 where none is."""

import torch

FULL_MASK = 0
"""The mask has a column for every token of the request; in the other mode only for the nodes."""


def build_tree_kernel_efficient_cpu(
    parent_list, selected_index, seq_lens, tree_mask, positions, retrieve_index, retrieve_next_token,
    retrieve_next_sibling, topk, depth, draft_token_num, tree_mask_mode,
):  # fmt: skip
    """Links, visibility and positions of the nodes that drafting selected."""
    nodes, written = draft_token_num, 0
    for request, length in enumerate(seq_lens.tolist()):
        parents = _parents(parent_list[request].tolist(), selected_index[request].tolist(), topk)
        retrieve_index[request] = torch.arange(request * nodes, (request + 1) * nodes)
        for node in range(nodes - 1, 0, -1):  # from the last: the first child of all comes to stand first
            if (parent := parents[node]) is not None:
                retrieve_next_sibling[request, node] = retrieve_next_token[request, parent]
                retrieve_next_token[request, parent] = node
        sees = torch.eye(nodes, dtype=torch.bool)
        sees[:, 0] = True
        for node in range(1, nodes):
            if parents[node] is not None:
                sees[node] |= sees[parents[node]]
        positions[request * nodes : (request + 1) * nodes] = length + sees.sum(1) - 1
        before = length if int(tree_mask_mode) == FULL_MASK else 0
        for row in sees:
            written += before
            tree_mask[written : written + nodes] = row
            written += nodes


def verify_tree_greedy_cpu(
    predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token, retrive_next_sibling,
    target_predict,
):  # fmt: skip
    """Walk from the root as long as a child is the token that the target would have taken."""
    for request, wanted in enumerate(target_predict.tolist()):
        tokens, first = candidates[request].tolist(), retrive_next_token[request].tolist()
        sibling, index = retrive_next_sibling[request].tolist(), retrive_index[request].tolist()
        path = [0]
        while len(path) < accept_index.shape[1]:
            child = first[path[-1]]
            while child >= 0 and tokens[child] != wanted[path[-1]]:
                child = sibling[child]
            if child < 0:
                break
            path.append(child)
        for step, node in enumerate(path):
            accept_index[request, step] = index[node]
            predicts[index[node]] = wanted[node]
        accept_token_num[request] = len(path) - 1


def fill_bonus_tokens_cpu(accept_tokens, accept_lens, bonus_tokens, accept_stride):
    """The last accepted token of each request."""
    last = torch.arange(len(accept_lens)) * accept_stride + accept_lens.long() - 1
    bonus_tokens.copy_(accept_tokens.flatten()[last])


def rotate_input_ids_cpu(input_ids, extend_start_loc, extend_seq_lens, topk_index, select_index=None):
    """Only drafts of several layers need it, and no test here has one."""
    raise NotImplementedError("the stand-in does not serve drafts of several layers")


def _parents(parent_list: list[int], selected: list[int], topk: int) -> list[int | None]:
    """For each node the node it follows; None where that was not selected."""
    node_of = {candidate: node for node, candidate in enumerate(selected, start=1)}
    of_group = [0 if group == 0 else node_of.get(parent_list[group]) for group in (c // topk for c in selected)]
    return [None, *of_group]
