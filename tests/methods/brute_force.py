"""Every selection rule again, as slowly and plainly as it can be written: float64, one sample, loops, no algebra.

Each function takes what the method takes as numpy arrays of one sample and returns {position: row} of what is kept.
Written from the formulas, not from the library; ties go to the lower position.
"""

import itertools

import numpy as np


def cos(a, b):
    return float(a @ b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12)


def ranked(scores):
    """Positions by falling score."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def rows(x, kept):
    return {int(i): x[i] for i in kept}


def uniform(x, keep):
    return rows(x, [int((j + 0.5) * len(x) / keep) for j in range(keep)])


def best_cells(grid, keep):
    """Cells (h, w): most cells, then nearest aspect, then fewer rows; over all pairs."""
    pairs = [(h, w) for h, w in itertools.product(range(1, grid[0] + 1), range(1, grid[1] + 1)) if h * w <= keep]
    most = max(h * w for h, w in pairs)
    aspect = grid[0] / grid[1]
    full = [(h, w) for h, w in pairs if h * w == most]
    return min(full, key=lambda cell: (round(abs(np.log(cell[0] / cell[1] / aspect)), 9), cell[0]))


def with_fill(x, kept, keep):
    unused = [i for i in range(len(x)) if i not in kept]
    count = keep - len(kept)
    return kept | {unused[int((j + 0.5) * len(unused) / count)]: None for j in range(count)}


def grid(x, keep, shape):
    height, width = best_cells(shape, keep)
    kept = {}
    for i, j in itertools.product(range(height), range(width)):
        kept[int((i + 0.5) * shape[0] / height) * shape[1] + int((j + 0.5) * shape[1] / width)] = None
    return rows(x, with_fill(x, kept, keep))


def avg_pool(x, keep, shape):
    height, width = best_cells(shape, keep)
    image = x.reshape(*shape, -1)
    kept = {}
    for i, j in itertools.product(range(height), range(width)):
        top, bottom = i * shape[0] // height, int(np.ceil((i + 1) * shape[0] / height))
        left, right = j * shape[1] // width, int(np.ceil((j + 1) * shape[1] / width))
        centre = (top + bottom - 1) // 2 * shape[1] + (left + right - 1) // 2
        kept[centre] = image[top:bottom, left:right].reshape(-1, x.shape[1]).mean(0)
    return {i: x[i] if row is None else row for i, row in with_fill(x, kept, keep).items()}


def by_score(x, keep, scores):
    return rows(x, ranked(scores)[:keep])


def tome(x, keep):
    sequence = [(i, x[i], 1) for i in range(len(x))]
    while len(sequence) > keep:
        evens, odds = sequence[0::2], list(sequence[1::2])
        r = min(len(sequence) - keep, len(sequence) // 2)
        best = [max(range(len(odds)), key=lambda b: (cos(a[1], odds[b][1]), -b)) for a in evens]
        order = ranked([cos(a[1], odds[b][1]) for a, b in zip(evens, best, strict=True)])
        groups = {b: [] for b in range(len(odds))}
        for a in order[:r]:
            groups[best[a]].append(evens[a])
        merged = []
        for b, members in groups.items():
            total = odds[b][2] + sum(m[2] for m in members)
            mean = (odds[b][2] * odds[b][1] + sum(m[2] * m[1] for m in members)) / total
            merged.append((odds[b][0], mean, total))
        sequence = [evens[a] for a in sorted(order[r:])] + merged
    return {index: row for index, row, _ in sequence}, {index: size for index, _, size in sequence}


def divprune(x, keep):
    n = len(x)
    distance = np.array([[1 - cos(a, b) for b in x] for a in x])
    chosen = [max(range(n), key=lambda i: (sorted(distance[i])[1], -i))]
    while len(chosen) < keep:
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: (min(distance[i][s] for s in chosen), -i)))
    return rows(x, chosen)


def outlierness(x):
    n = len(x)
    common = np.array([np.mean([cos(x[i], x[j]) for j in range(n) if j != i]) for i in range(n)])
    return (common.max() - common + 1e-6) / (common.max() - common.min())


def cenprune(x, keep):
    n, g = len(x), outlierness(x)
    centred = x - x.mean(0)
    distance = np.array([[1 - cos(a, b) for b in centred] for a in centred])
    chosen = [max(range(n), key=lambda i: (g[i] * min(np.delete(distance[i], i)), -i))]
    while len(chosen) < keep:
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: (g[i] * min(distance[i][s] for s in chosen), -i)))
    return rows(x, chosen)


def cenprune_dpp(x, keep, relevance):
    weight, centred = outlierness(x) * relevance, x - x.mean(0)
    n = len(x)
    kernel = np.array([[weight[i] * cos(centred[i], centred[j]) * weight[j] for j in range(n)] for i in range(n)])
    return rows(x, log_det_greedy(kernel, keep))


def lrcp(x, keep, rank):
    centred = x - x.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    rest = centred - centred @ axes[:rank].T @ axes[:rank]
    kept = sorted(ranked((rest**2).sum(1))[:keep])
    groups = {i: [x[i]] for i in kept}
    for i in range(len(x)):
        if i not in groups:
            groups[max(kept, key=lambda j: (cos(x[i], x[j]), -j))].append(x[i])
    return {i: np.mean(members, axis=0) for i, members in groups.items()}


def stacktok(x, keep, words):
    relevance = np.array([softmax(np.array([cos(w, v) for v in x]) / 0.02) for w in words])
    cover = np.array([softmax(np.array([cos(a, b) for b in x]) / 0.2) for a in x])
    beta = np.mean([-sum(p * np.log(p) for p in row if p > 0) / np.log(len(x)) for row in relevance])
    alone = []
    while len(alone) < keep:
        left = [i for i in range(len(x)) if i not in alone]
        alone.append(max(left, key=lambda i: (round(coverage(cover, [*alone, i]), 9), -i)))
    chosen = []
    while len(chosen) < keep:
        left = [i for i in range(len(x)) if i not in chosen]
        enough = not chosen or coverage(cover, chosen) >= beta * coverage(cover, alone[: len(chosen)])
        matrix = relevance if enough else cover
        chosen.append(max(left, key=lambda i: (coverage(matrix, [*chosen, i]), -i)))
    return rows(x, chosen)


def evocut_score(changes, clusters, updates):
    n = len(changes)
    u = changes / np.linalg.norm(changes, axis=1, keepdims=True)
    distance = np.array([[1 - cos(a, b) for b in u] for a in u])
    starts = [max(range(n), key=lambda i: (min(np.delete(distance[i], i)), -i))]
    while len(starts) < clusters:
        left = [i for i in range(n) if i not in starts]
        starts.append(max(left, key=lambda i: (min(distance[i][s] for s in starts), -i)))
    centres = u[starts]
    for _ in range(updates):
        nearest = (u @ centres.T).argmax(1)
        for c in range(clusters):
            if (nearest == c).any():
                mean = u[nearest == c].mean(0)
                centres[c] = mean / np.linalg.norm(mean)
    return 1 - (u @ centres.T).max(1)


def evocut(x, keep, states, clusters=8, updates=10):
    score = None
    for before, after in zip(states[:-1], states[1:], strict=True):
        unusual = evocut_score(after - before, clusters, updates)
        score = unusual if score is None else 0.95 * score + 0.05 * unusual
    return by_score(x, keep, score)


def log_det_greedy(kernel, keep):
    """Picks in order, by the determinant itself."""
    chosen = []
    for _ in range(keep):
        left = [i for i in range(len(kernel)) if i not in chosen]
        sets = {i: np.ix_([*chosen, i], [*chosen, i]) for i in left}
        volume = {i: np.linalg.slogdet(kernel[picked])[1] for i, picked in sets.items()}
        chosen.append(max(left, key=lambda i: (volume[i], -i)))
    return chosen


def gram_schmidt_greedy(z, keep, first=None):
    """Picks in order and what is left of every token, by orthogonalising the tokens themselves."""
    rest, chosen = z.copy(), []
    for step in range(keep):
        energy = (rest**2).sum(1)
        energy[chosen] = -1
        pick = int(energy.argmax()) if step or first is None else first
        axis = rest[pick] / np.linalg.norm(rest[pick])
        rest = rest - np.outer(rest @ axis, axis)
        chosen.append(pick)
    return chosen, np.sqrt((rest**2).sum(1))


def cdpruner(x, keep, relevance, theta=None):
    r = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    if theta is not None:
        r = np.exp(theta / (2 * (1 - theta)) * r)
    n = len(x)
    kernel = np.array([[r[i] * cos(x[i], x[j]) * r[j] for j in range(n)] for i in range(n)])
    return rows(x, log_det_greedy(kernel, keep))


def coverage(matrix, chosen):
    return sum(max([0.0, *(row[i] for i in chosen)]) for row in matrix)


def coverage_greedy(matrix, keep, weight=None):
    chosen = []
    for _ in range(keep):
        left = [i for i in range(matrix.shape[1]) if i not in chosen]
        now = coverage(matrix, chosen)
        gains = {i: (coverage(matrix, [*chosen, i]) - now) * (1 if weight is None else weight[i]) for i in left}
        chosen.append(max(left, key=lambda i: (gains[i], -i)))
    return chosen


def softmax(values):
    shifted = np.exp(values - values.max())
    return shifted / shifted.sum()


def mmtok(x, keep, features, text, tau_t=0.02, tau_v=0.2, alpha=0.5):
    n = len(x)
    image = [softmax(np.array([cos(a, b) for b in features]) / tau_v) * alpha / n for a in features]
    words = [softmax(np.array([cos(t, b) for b in x]) / tau_t) / len(text) for t in text]
    return rows(x, coverage_greedy(np.array([*words, *image]), keep))


def scope(x, keep, attention, alpha=1.0):
    similarity = np.array([[cos(a, b) for b in x] for a in x])
    return rows(x, coverage_greedy(similarity, keep, attention.sum(0) ** alpha))


def visionzip(x, keep, attention, keys):
    extra = int(keep * 10 / 64)
    order = ranked(attention.sum(0))
    dominant = sorted(order[: keep - extra])
    rest = [i for i in range(len(x)) if i not in dominant]
    kept = rows(x, dominant)
    if extra:
        targets = rest[:: len(rest) // extra][:extra]
        metric = keys.mean(0)
        members = {t: [] for t in targets}
        for i in rest:
            if i not in targets:
                members[max(targets, key=lambda t: (cos(metric[i], metric[t]), -t))].append(x[i])
        kept |= {t: x[t] + (np.mean(members[t], 0) if members[t] else 0) for t in targets}
    return kept


def vispruner(x, keep, attention, important=0.5, step=8):
    order = ranked(attention.mean(0))
    first = int(keep * important)
    ranking = order[first:]
    while len(ranking) > keep - first:
        evens, odds = ranking[0::2], ranking[1::2]
        closest = [max(cos(x[a], x[b]) for b in odds) for a in evens]
        drop = ranked(closest)[: min(step, len(ranking) - (keep - first))]
        ranking = [i for i in ranking if i not in [evens[d] for d in drop]]
    return rows(x, order[:first] + ranking)


def prumerge_plus(x, keep, logits, keys, neighbours=32):
    """`logits` (heads, 1 + N) before the softmax of each head, scaled by 1 / sqrt(head width)."""
    heads = len(logits)
    attention = softmax(logits.sum(0) * np.sqrt(1 / heads))[1:]
    n, own = len(x), max(1, keep - 1)
    order = ranked(attention)
    kept = order[: -(-own // 2)]
    rest = [i for i in range(n) if i not in kept]
    count = own // 2
    kept = sorted(kept + [rest[int((j + 0.5) * len(rest) / count)] for j in range(count)])
    wide = keys.transpose(1, 0, 2).reshape(n, -1)
    result = {}
    for i in kept:
        near = sorted((j for j in range(n) if j != i), key=lambda j: (-cos(wide[i], wide[j]), j))[:neighbours]
        result[i] = x[i] + sum(attention[j] * x[j] for j in near)
    if keep > own:
        left = [i for i in range(n) if i not in kept]
        result[left[-1]] = sum(attention[j] * x[j] for j in left)
    return result


def crops_of(n, count):
    sizes = [n // count + (p < n % count) for p in range(count)]
    edges = np.cumsum([0, *sizes])
    return [list(range(edges[p], edges[p + 1])) for p in range(count)]


def holov(x, keep, attention, crops=16, beta=0.09, inside="attention"):
    a = 1e3 * attention.mean(0)
    score = np.zeros(len(x))
    groups = crops_of(len(x), min(crops, len(x)))
    for group in groups:
        size = len(group)
        spread = np.zeros(size)
        for p, i in enumerate(group):
            row = [0.0 if i == j else cos(x[i], x[j]) for j in group]
            mean = sum(row) / max(1, size - 1)
            spread[p] = sum((value - mean) ** 2 for value in row) / max(1, size - 1)
        spread *= np.abs(a[group]).mean() / (np.abs(spread).mean() + 1e-6)
        score[group] = a[group] + beta * spread
    means = np.array([score[group].mean() for group in groups])
    share = means / means.sum()
    quota = np.floor(share * keep).astype(int)
    for p in ranked(share)[: keep - quota.sum()]:
        quota[p] += 1
    by = a if inside == "attention" else score
    kept = []
    for group, count in zip(groups, quota, strict=True):
        kept += sorted(group, key=lambda i: (-by[i], i))[:count]
    kept += [i for i in ranked(by) if i not in kept][: keep - len(kept)]
    return rows(x, kept), quota


def vscan_vision(x, keep, shallow, deep, shape, windows=4, local=0.5):
    shallow, deep = shallow.mean(0), deep.mean(0)
    each = int(keep * local) // windows**2
    kept = []
    for wr, wc in itertools.product(range(windows), range(windows)):
        members = [
            r * shape[1] + c
            for r, c in itertools.product(range(shape[0]), range(shape[1]))
            if r * windows // shape[0] == wr and c * windows // shape[1] == wc
        ]
        kept += sorted(members, key=lambda i: (-shallow[i], i))[:each]
    kept += [i for i in ranked(deep) if i not in kept][: keep - len(kept)]
    return merged(x, sorted(kept))


def merged(x, kept, floor=None, weight=None):
    """Every other token into its most similar kept one (unless below the floor), weighted means."""
    weight = np.ones(len(x)) if weight is None else weight
    groups = {i: [i] for i in kept}
    for j in range(len(x)):
        if j not in groups:
            target = max(kept, key=lambda i: (cos(x[j], x[i]), -i))
            if floor is None or cos(x[j], x[target]) >= floor:
                groups[target].append(j)
    return {i: sum(weight[j] * x[j] for j in group) / weight[group].sum() for i, group in groups.items()}


def dart(x, keep, keys, text_keys, hidden_text, norm, image_pivots=4, text_pivots=4):
    """Text arguments hold the sample's real text tokens only."""
    strength = np.abs(keys).sum((0, 2))
    text_strength = np.abs(text_keys).sum((0, 2))
    images = ranked(strength)[: min(image_pivots, keep)]
    words = ranked(text_strength)[:text_pivots]
    pivots = [norm(x[i]) for i in images]
    if keep > len(images):
        pivots += [norm(hidden_text[t]) for t in words]
        pivots += [norm(hidden_text[words[j % len(words)]]) for j in range(text_pivots - len(words))]
    kept = list(images)
    left = keep - len(kept)
    for number, pivot in enumerate(pivots):
        free = [i for i in range(len(x)) if i not in kept]
        free.sort(key=lambda i: (cos(norm(x[i]), pivot), i))
        kept += free[: left // len(pivots) + (number < left % len(pivots))]
    return rows(x, kept)


def sparsevlm_scores(image, text, attention):
    """`attention` (heads, T, N) and `text` hold the real text tokens only."""
    relevance = np.mean([softmax(text @ v) for v in image], 0)
    raters = [t for t in range(len(text)) if relevance[t] > relevance.mean()]
    return attention[:, raters].mean((0, 1))


def sparsevlm_groups(x, keep, scores):
    """Own rows, and the pool of dropped tokens to be clustered with the number of clusters."""
    n = len(x)

    def clusters(own):
        pool = int(0.3 * (n - own)) + 1
        return pool // 10 + 1

    own = max((own for own in range(1, keep) if own + clusters(own) == keep), default=keep)
    order = ranked(scores)
    if own == keep:
        return sorted(order[:own]), [], 0
    pool = sorted(order[own : own + int(0.3 * (n - own)) + 1])
    return sorted(order[:own]), pool, clusters(own)


def density_peak_clusters(members, count):
    """Centres and the cluster of every member: density over the `count` nearest (itself included), Euclidean."""
    m, dim = members.shape
    distance = np.array([[np.linalg.norm(a - b) / np.sqrt(dim) for b in members] for a in members])
    density = [np.exp(-np.mean(np.sort(row)[:count] ** 2)) for row in distance]
    score = []
    for i in range(m):
        denser = [distance[i][j] for j in range(m) if (-density[j], j) < (-density[i], i)]
        score.append(density[i] * (min(denser) if denser else distance[i].max()))
    centres = sorted(ranked(score)[:count])
    return centres, [min(centres, key=lambda c: (distance[i][c], c)) for i in range(m)]


def sparsevlm(x, keep, scores):
    own, pool, count = sparsevlm_groups(x, keep, scores)
    kept = rows(x, own)
    if pool:
        members = x[pool]
        centres, cluster = density_peak_clusters(members, count)
        kept |= {pool[c]: sum(members[i] for i in range(len(pool)) if cluster[i] == c) for c in centres}
    return kept
