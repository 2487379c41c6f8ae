/* The loss of PPO for a tile of rows: figures of each row, and the gradient by what the networks say.
 *
 * The formulas are those of rustyrl_learner/distribution.py and rustyrl_learner/ppo.py, which tests hold it against. All
 * of it works on columns, [columns, TILE]: what is the same number of each row stands side by side.
 */

enum { BOX, SQUASHED, CHOICE, KINDS };
static const float LOG_2_PI = 1.837877066409345483560659472811f, LOG_2 = 0.693147180559945309417f;
static const float MASKED = -1e9f; /* a logit whose probability is 0 */

/* A part of an action: `groups` choices among `choices` each, or a box of `groups` numbers.
 *
 * column, output: its first column of the joined action, and of what the policy says
 * extra: its first column of the joined masks, or -1 if it is not masked; of a box the first of its log_std among all
 * parameters
 */
typedef struct {
    int32_t kind, groups, choices, column, output, extra;
} Block;

/* blocks: [count], a copy that was looked through
 * parameters: all of them, for those that are log_std
 * nodes, weights: [points], of the expectation under a standard normal
 * log_prob_start, entropy_start: what they are before a row is looked at
 * order: [n], which rows these are
 * of all rows: action [N, A], mask [N, masks], the others [N]
 * of these rows, in their order: advantage [n]; log_prob and value [n] are written
 * clip, value_clip: see policy_loss and value_loss
 * each: 1 / n; dentropy, dvalue: the loss by the entropy, and by the gradient of value_loss, of one row
 */
typedef struct {
    const Block *blocks;
    size count, points, masks;
    const float *parameters, *nodes, *weights;
    float log_prob_start, entropy_start;
    const int32_t *order;
    Matrix action;
    const unsigned char *mask;
    const float *proximal, *importance, *old_value, *target, *advantage;
    float *log_prob, *value;
    float clip, value_clip, each, dentropy, dvalue;
} Loss;

/* What it works on: columns of a tile. `outputs` becomes whatever is needed of it for the gradient. */
typedef struct {
    float *outputs, *doutputs; /* [outputs, TILE] */
    float *entropies;          /* [outputs, TILE], of which each group takes one */
    float *action;             /* [A, TILE] */
    float *value, *dvalue;     /* [TILE] each, like all below */
    float *log_prob, *entropy, *dlog_prob;
} Columns;

/* What is added up over rows, and then a mean; the same as in rustyrl_learner/ppo.py, where the norm follows. */
enum { POLICY_LOSS, VALUE_LOSS, ENTROPY, APPROX_KL, CLIP_FRACTION, SUMS, NORM = SUMS, FIGURES };

/* Those rows of an array of numbers as a column, 0 beyond them. */
static void fetch(const float *from, size stride, const int32_t *order, size rows, float *to)
{
    for (size r = 0; r < rows; r++)
        to[r] = from[order[r] * stride];
    memset(to + rows, 0, sizeof(float) * (TILE - rows));
}

/* Eight of them from row r of the tile on. */
INLINE vec fetch_eight(const float *from, const int32_t *order, size rows, size r)
{
    float some[LANE] = {0};
    for (size i = 0; i < LANE && r + i < rows; i++)
        some[i] = from[order[r + i]];
    return load(some);
}

/* Which of 8 rows from r on there are. */
INLINE mask present(size rows, size r)
{
    mask index = {0, 1, 2, 3, 4, 5, 6, 7};
    return index < (int)(rows - r);
}

INLINE void add_to(float *at, vec v) { store(at, load(at) + v); }

/* log(1 - tanh(u)^2), and tanh(u). */
INLINE vec squash(vec u, vec *tanh)
{
    vec size_of = positive(u), e = exponential(size_of * -2), one = e + 1, t = (1 - e) / one;
    *tanh = choose(u < spread(0), -t, t);
    return (LOG_2 - size_of - logarithm(one)) * 2;
}

/* Logits of choices that the rows' masks do not allow. */
static void mask_choices(const Loss *loss, const Block *block, const Columns *at, const int32_t *order, size rows)
{
    if (block->extra >= 0)
        for (size i = 0; i < block->groups * block->choices; i++)
            for (size r = 0; r < rows; r++)
                if (!loss->mask[order[r] * loss->masks + block->extra + i])
                    at->outputs[(block->output + i) * TILE + r] = MASKED;
}

/* The largest of the logits of 8 rows, from `start` to `end`. */
INLINE vec largest_logit(const float *outputs, size start, size end, size r)
{
    vec largest = load(outputs + start + r);
    for (size c = start + TILE; c < end; c += TILE) {
        vec logit = load(outputs + c + r);
        largest = choose(logit > largest, logit, largest);
    }
    return largest;
}

/* Of k choices: log-probability and entropy; `outputs` becomes the logarithms of their probabilities, which `doutputs`
 * become. */
FAST static void trace_choices(const Block *block, const Columns *at, size rows)
{
    for (size g = 0; g < block->groups; g++) {
        size start = (block->output + g * block->choices) * TILE, end = start + block->choices * TILE;
        for (size r = 0; r < rows; r += LANE) {
            vec chosen = load(at->action + (block->column + g) * TILE + r);
            vec largest = largest_logit(at->outputs, start, end, r);
            vec odds = spread(0), entropy = spread(0), log_prob = spread(__builtin_nanf("")), choice = spread(0);
            for (size c = start; c < end; c += TILE)
                odds += exponential(load(at->outputs + c + r) - largest);
            odds = logarithm(odds);
            for (size c = start; c < end; c += TILE, choice += 1) {
                vec log_odds = load(at->outputs + c + r) - largest - odds, probability = exponential(log_odds);
                entropy -= probability * log_odds;
                log_prob = choose(choice == chosen, log_odds, log_prob); /* stays no number for a choice that is none */
                store(at->outputs + c + r, log_odds);
                store(at->doutputs + c + r, probability);
            }
            store(at->entropies + (block->output + g) * TILE + r, entropy);
            add_to(at->entropy + r, entropy);
            add_to(at->log_prob + r, log_prob);
        }
    }
}

FAST static void differentiate_choices(const Loss *loss, const Block *block, const Columns *at, size rows)
{
    for (size g = 0; g < block->groups; g++) {
        size start = (block->output + g * block->choices) * TILE, end = start + block->choices * TILE;
        for (size r = 0; r < rows; r += LANE) {
            vec chosen = load(at->action + (block->column + g) * TILE + r), choice = spread(0);
            vec entropy = load(at->entropies + (block->output + g) * TILE + r), dlog_prob = load(at->dlog_prob + r);
            for (size c = start; c < end; c += TILE, choice += 1) {
                vec by_each = dlog_prob + (load(at->outputs + c + r) + entropy) * loss->dentropy;
                vec dlogit = load(at->doutputs + c + r) * -by_each;
                store(at->doutputs + c + r, dlogit + choose(choice == chosen, dlog_prob, spread(0)));
            }
        }
    }
}

/* Of a box: `outputs` become the distances from the mean in deviations, and `doutputs` what the entropy alone gives.
 * `gradients` may be NULL. */
FAST static void trace_box(const Loss *loss, const Block *block, const Columns *at, size rows, float *gradients)
{
    for (size a = 0; a < block->groups; a++) {
        float *outputs = at->outputs + (block->output + a) * TILE, *doutputs = at->doutputs + (block->output + a) * TILE;
        const float *action = at->action + (block->column + a) * TILE;
        float deviation = exponential(spread(loss->parameters[block->extra + a]))[0];
        vec ddeviation = spread(0);
        for (size r = 0; r < rows; r += LANE) {
            vec raw = load(action + r), mean = load(outputs + r), doutput = spread(0);
            vec scaled = (raw - mean) / deviation, log_prob = scaled * scaled * -0.5f;
            if (block->kind == SQUASHED) {
                vec entropy = spread(0), tanh;
                log_prob -= squash(raw, &tanh);
                for (size k = 0; k < loss->points; k++) {
                    float distance = deviation * loss->nodes[k];
                    entropy += squash(mean + distance, &tanh) * loss->weights[k];
                    vec slope = tanh * (-2 * loss->dentropy * loss->weights[k]);
                    doutput += slope;
                    ddeviation += choose(present(rows, r), slope * distance, spread(0));
                }
                add_to(at->entropy + r, entropy);
            }
            add_to(at->log_prob + r, log_prob);
            store(outputs + r, scaled);
            store(doutputs + r, doutput);
        }
        if (gradients)
            gradients[block->extra + a] += total(ddeviation) + loss->dentropy * (float)rows;
    }
}

FAST static void differentiate_box(const Loss *loss, const Block *block, const Columns *at, size rows, float *gradients)
{
    for (size a = 0; a < block->groups; a++) {
        float *outputs = at->outputs + (block->output + a) * TILE, *doutputs = at->doutputs + (block->output + a) * TILE;
        float deviation = exponential(spread(loss->parameters[block->extra + a]))[0];
        vec ddeviation = spread(0);
        for (size r = 0; r < rows; r += LANE) {
            vec scaled = load(outputs + r), dlog_prob = load(at->dlog_prob + r);
            add_to(doutputs + r, scaled * dlog_prob / deviation);
            ddeviation += (scaled * scaled - 1) * dlog_prob;
        }
        gradients[block->extra + a] += total(ddeviation);
    }
}

/* What log-probabilities and entropies begin with under the parameters as they are. */
static void begin_loss(Loss *loss, float log_half)
{
    loss->log_prob_start = -log_half;
    loss->entropy_start = log_half;
    for (const Block *block = loss->blocks; block < loss->blocks + loss->count; block++)
        for (size a = 0; block->kind != CHOICE && a < block->groups; a++) {
            float log_std = loss->parameters[block->extra + a];
            loss->log_prob_start -= log_std + 0.5f * LOG_2_PI;
            loss->entropy_start += log_std + 0.5f * (1 + LOG_2_PI);
        }
}

/* What the policy said of these rows, 0 beyond them, as far as masks allow it. */
static void take_outputs(const Loss *loss, const Columns *at, size outputs, const int32_t *order, size rows)
{
    for (size i = 0; i < outputs; i++)
        memset(at->outputs + i * TILE + rows, 0, sizeof(float) * (TILE - rows));
    for (const Block *block = loss->blocks; block < loss->blocks + loss->count; block++)
        if (block->kind == CHOICE)
            mask_choices(loss, block, at, order, rows);
}

/* Log-probabilities of the actions, and entropies. */
FAST static void trace(const Loss *loss, const Columns *at, size rows, float *gradients)
{
    for (size r = 0; r < TILE; r += LANE) {
        store(at->log_prob + r, spread(loss->log_prob_start));
        store(at->entropy + r, spread(loss->entropy_start));
    }
    for (const Block *block = loss->blocks; block < loss->blocks + loss->count; block++)
        if (block->kind == CHOICE)
            trace_choices(block, at, rows);
        else
            trace_box(loss, block, at, rows, gradients);
}

/* From outputs and values of rows `first` on to their gradients; adds up what `sums` are of. */
FAST static void lose(const Loss *loss, const Columns *at, size outputs, size first, size rows, float *gradients,
                      float *sums)
{
    const int32_t *order = loss->order + first;
    float advantages[TILE] = {0};
    memcpy(advantages, loss->advantage + first, sizeof(float) * rows);
    take_outputs(loss, at, outputs, order, rows);
    memset(at->value + rows, 0, sizeof(float) * (TILE - rows));
    for (size i = 0; i < loss->action.columns; i++)
        fetch(loss->action.at + i * loss->action.column, loss->action.row, order, rows, at->action + i * TILE);
    trace(loss, at, rows, gradients);
    memcpy(loss->log_prob + first, at->log_prob, sizeof(float) * rows);
    memcpy(loss->value + first, at->value, sizeof(float) * rows);
    vec sum[SUMS] = {0};
    for (size r = 0; r < rows; r += LANE) {
        mask here = present(rows, r);
        vec advantage = load(advantages + r), old = fetch_eight(loss->old_value, order, rows, r);
        vec log_ratio = load(at->log_prob + r) - fetch_eight(loss->proximal, order, rows, r);
        vec ratio = exponential(log_ratio), importance = fetch_eight(loss->importance, order, rows, r);
        vec gain = ratio * advantage, limit = clamp(ratio, 1 - loss->clip, 1 + loss->clip) * advantage;
        vec dlog_prob = choose(gain > limit, spread(0), gain) * (importance * -loss->each);
        store(at->dlog_prob + r, choose(here, dlog_prob, spread(0))); /* of no row may a ratio be infinite */
        sum[POLICY_LOSS] -= choose(here, choose(gain > limit, limit, gain) * importance, spread(0));
        sum[ENTROPY] += choose(here, load(at->entropy + r), spread(0));
        sum[APPROX_KL] += choose(here, above_tangent(log_ratio, ratio), spread(0));
        sum[CLIP_FRACTION] += choose(here & (positive(ratio - 1) > spread(loss->clip)), spread(1), spread(0));
        vec value = load(at->value + r), target = fetch_eight(loss->target, order, rows, r), error = value - target;
        vec square = error * error;
        if (loss->value_clip > 0) {
            vec change = value - old, clipped = old + clamp(change, -loss->value_clip, loss->value_clip) - target;
            mask beyond = (positive(change) > spread(loss->value_clip)) & (positive(clipped) > positive(error));
            square = choose(positive(clipped) <= positive(error), square, clipped * clipped);
            error = choose(beyond, spread(0), error);
        }
        sum[VALUE_LOSS] += choose(here, square * 0.5f, spread(0));
        store(at->dvalue + r, error * loss->dvalue);
    }
    for (const Block *block = loss->blocks; block < loss->blocks + loss->count; block++)
        if (block->kind == CHOICE)
            differentiate_choices(loss, block, at, rows);
        else
            differentiate_box(loss, block, at, rows, gradients);
    for (int i = 0; i < SUMS; i++)
        sums[i] += total(sum[i]);
}
