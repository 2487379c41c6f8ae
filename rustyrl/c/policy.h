/* What networks say of rows, and actions drawn from what a policy says, with their log-probabilities.
 *
 * How actions are drawn is in rustyrl_actors/sampling.py, and their log-probabilities in loss.h.
 */

typedef struct {
    Work work;
    Matrix x;
    Layer layers[MAX_LAYERS];
    Matrix out;
    size count, widest;
    float *panels;
} Forward;

/* What comes out of each layer: of all but the last alternately in `between`. */
static void place_outs(const Forward *this, size rows, float *between, Matrix last, Matrix *outs)
{
    for (size l = 0; l < this->count; l++) {
        size width = this->layers[l].out;
        outs[l] = (Matrix){between + l % 2 * TILE * this->widest, rows, width, width, 1};
    }
    outs[this->count - 1] = last;
}

FAST static void go_forward(const Work *work, size Py_UNUSED(piece), size begin, size end, float *room)
{
    const Forward *this = (const Forward *)work;
    for (size first = begin; first < end; first += TILE) {
        size rows = least(TILE, end - first);
        Matrix outs[MAX_LAYERS];
        place_outs(this, rows, room, rows_from(this->out, first, rows), outs);
        run_forth(this->layers, this->count, rows_from(this->x, first, rows), outs, NULL);
    }
}

/* forward: the policy's; its `out` is not used
 * loss: what its log-probabilities need; its `action` and `log_prob` are of all rows
 * mean, scale: [in], of observations that are normalised and then clipped to +- limit; NULL if they are not
 * noise: [N, A], or its at is NULL where actions are given
 */
typedef struct {
    Forward forward;
    Loss loss;
    float *mean, *scale, limit;
    Matrix noise;
} Policy;

/* How many numbers `go_policy` needs for itself. */
static size policy_room(const Policy *this)
{
    size in = this->forward.x.columns, outputs = this->forward.layers[this->forward.count - 1].out;
    return TILE * (2 * this->forward.widest + in + 3 * outputs + 2 * this->loss.action.columns + 2);
}

static Matrix normalize_rows(const Policy *this, Matrix x, float *to)
{
    Matrix normalized = {to, x.rows, x.columns, x.columns, 1};
    for (size r = 0; r < x.rows; r++, to += x.columns)
        for (size i = 0; i < x.columns; i++) {
            float z = (x.at[r * x.row + i * x.column] - this->mean[i]) * this->scale[i];
            z = z > this->limit ? this->limit : z;
            to[i] = z < -this->limit ? -this->limit : z;
        }
    return normalized;
}

/* The first choice whose cumulated probability exceeds uniform noise. */
FAST static void draw_choices(const Block *block, const Columns *at, const float *noise)
{
    for (size g = 0; g < block->groups; g++) {
        size start = (block->output + g * block->choices) * TILE, end = start + block->choices * TILE;
        size column = (block->column + g) * TILE;
        for (size r = 0; r < TILE; r += LANE) {
            vec largest = largest_logit(at->outputs, start, end, r), sum = spread(0), passed = spread(0);
            for (size c = start; c < end; c += TILE) {
                sum += exponential(load(at->outputs + c + r) - largest);
                store(at->doutputs + c + r, sum);
            }
            vec below = (vec)((mask)sum - 1); /* the next number: one choice is not passed, and it is none of odds 0 */
            vec limit = load(noise + column + r) * sum;
            limit = choose(limit > below, below, limit);
            for (size c = start; c < end; c += TILE)
                passed += choose(load(at->doutputs + c + r) <= limit, spread(1), spread(0));
            store(at->action + column + r, passed);
        }
    }
}

/* The mean and standard normal noise. */
FAST static void draw_box(const Loss *loss, const Block *block, const Columns *at, const float *noise)
{
    for (size a = 0; a < block->groups; a++) {
        size column = (block->column + a) * TILE;
        float deviation = exponential(spread(loss->parameters[block->extra + a]))[0];
        for (size r = 0; r < TILE; r += LANE) {
            vec mean = load(at->outputs + (block->output + a) * TILE + r);
            store(at->action + column + r, load(noise + column + r) * deviation + mean);
        }
    }
}

FAST static void go_policy(const Work *work, size Py_UNUSED(piece), size begin, size end, float *room)
{
    const Policy *this = (const Policy *)work;
    const Forward *forward = &this->forward;
    const Loss *loss = &this->loss;
    const Matrix *action = &loss->action;
    size outputs = forward->layers[forward->count - 1].out;
    float *between = room, *column = room += 2 * TILE * forward->widest;
    Columns at = {.outputs = column, .doutputs = column + outputs * TILE, .entropies = column + 2 * outputs * TILE};
    at.action = column += 3 * outputs * TILE;
    float *noise = column += action->columns * TILE;
    at.log_prob = column += action->columns * TILE;
    at.entropy = column += TILE;
    float *normalized = column += TILE;
    for (size first = begin; first < end; first += TILE) {
        size rows = least(TILE, end - first);
        int32_t order[TILE];
        for (size r = 0; r < TILE; r++)
            order[r] = (int32_t)(first + r);
        Matrix x = rows_from(forward->x, first, rows), outs[MAX_LAYERS];
        if (this->mean)
            x = normalize_rows(this, x, normalized);
        place_outs(forward, rows, between, (Matrix){at.outputs, rows, outputs, 1, TILE}, outs);
        run_forth(forward->layers, forward->count, x, outs, NULL);
        take_outputs(loss, &at, outputs, order, rows);
        Matrix from = this->noise.at ? this->noise : *action;
        for (size i = 0; i < action->columns; i++)
            fetch(from.at + i * from.column, from.row, order, rows, (this->noise.at ? noise : at.action) + i * TILE);
        for (const Block *block = loss->blocks; this->noise.at && block < loss->blocks + loss->count; block++)
            if (block->kind == CHOICE)
                draw_choices(block, &at, noise);
            else
                draw_box(loss, block, &at, noise);
        for (size i = 0; this->noise.at && i < action->columns; i++)
            for (size r = 0; r < rows; r++)
                action->at[(first + r) * action->row + i * action->column] = at.action[i * TILE + r];
        trace(loss, &at, rows, NULL);
        memcpy(loss->log_prob + first, at.log_prob, sizeof(float) * rows);
    }
}
