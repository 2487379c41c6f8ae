/* The gradient of PPO's loss on a minibatch, and the optimiser's step along it: a tile of rows goes through everything,
 * forth and back, before the next. Tiles make pieces, each with a gradient of its own, which are added up in their order.
 */

enum { MAX_PARTIAL = 1 << 23 }; /* numbers in gradients of pieces */
enum { MIN_SLICE = 1024, SUM_COST = 8, STEP_COST = 128 }; /* parameters; what a sum, and a step, takes, in products */

/* The layers that policy and critic share, if there are any, and those of each. */
enum { TRUNK, POLICY, CRITIC, PARTS };

/* parts: the layers of a part are those from parts[part] to parts[part + 1]
 * outputs: how many the policy has
 * parameters: how many there are
 * most: pieces of a minibatch
 * panels: where the layers' weights are brought to
 * partial: [pieces, parameters + SUMS], gradients and sums of each piece
 * The others are where in a thread's room something is, which begins with what goes in: `kept` what comes out of each
 * layer, `slopes` how its activation rises there, or 0 where what comes out tells.
 */
typedef struct {
    Work work;
    Matrix x;
    Layer layers[MAX_LAYERS];
    Loss loss;
    size parts[PARTS + 1], outputs, parameters, most;
    float *panels, *partial;
    size kept[MAX_LAYERS], slopes[MAX_LAYERS], columns, dfeatures, dz, between[2], sums;
} Gradient;

/* Rows of a matrix, side by side. */
static Matrix collect(Matrix from, const int32_t *order, size rows, float *to)
{
    Matrix tile = {to, rows, from.columns, from.columns, 1};
    for (size r = 0; r < rows; r++, to += from.columns) {
        const float *row = from.at + order[r] * from.row;
        if (from.column == 1)
            memcpy(to, row, sizeof(float) * from.columns);
        else
            for (size i = 0; i < from.columns; i++)
                to[i] = row[i * from.column];
    }
    return tile;
}

FAST static void go_gradient(const Work *work, size piece, size begin, size end, float *room)
{
    const Gradient *this = (const Gradient *)work;
    const Layer *layers = this->layers, *last = layers + this->parts[PARTS] - 1;
    const size *parts = this->parts;
    float *gradients = this->partial + piece * (this->parameters + SUMS), *column = room + this->columns;
    float *dz = room + this->dz, *between[2] = {room + this->between[0], room + this->between[1]};
    size outputs = this->outputs, action = this->loss.action.columns;
    Columns at = {.outputs = column, .doutputs = column + outputs * TILE, .entropies = column + 2 * outputs * TILE};
    at.action = column += 3 * outputs * TILE;
    at.value = column += action * TILE;
    at.dvalue = column += TILE;
    at.log_prob = column += TILE;
    at.entropy = column += TILE;
    at.dlog_prob = column += TILE;
    Matrix outs[MAX_LAYERS];
    float *slopes[MAX_LAYERS];
    for (size l = 0; l < parts[PARTS]; l++) {
        outs[l] = (Matrix){room + this->kept[l], TILE, layers[l].out, layers[l].out, 1};
        slopes[l] = this->slopes[l] ? room + this->slopes[l] : NULL;
    }
    outs[parts[CRITIC] - 1] = (Matrix){at.outputs, TILE, outputs, 1, TILE};
    outs[last - layers] = (Matrix){at.value, TILE, 1, 1, TILE};
    memset(gradients, 0, sizeof(float) * (this->parameters + SUMS));
    memset(dz, 0, sizeof(float) * (this->between[0] - this->dz)); /* what pads it is multiplied, too, and forgotten */
    for (size first = begin; first < end; first += TILE) {
        size rows = least(TILE, end - first);
        Matrix x = collect(this->x, this->loss.order + first, rows, room);
        Matrix features = run_forth(layers, parts[POLICY], x, outs, slopes), dfeatures = {0};
        if (parts[POLICY])
            dfeatures = (Matrix){room + this->dfeatures, rows, features.columns, features.columns, 1};
        for (int part = POLICY; part <= CRITIC; part++)
            run_forth(layers + parts[part], parts[part + 1] - parts[part], features, outs + parts[part], slopes + parts[part]);
        lose(&this->loss, &at, outputs, first, rows, gradients, gradients + this->parameters);
        for (int part = POLICY; part <= CRITIC; part++) {
            Matrix dy = {part == POLICY ? at.doutputs : at.dvalue, rows, part == POLICY ? outputs : 1, 1, TILE};
            run_back(layers + parts[part], parts[part + 1] - parts[part], features, outs + parts[part],
                     slopes + parts[part], dy, dfeatures, part == CRITIC, gradients, dz, between, room + this->sums);
        }
        run_back(layers, parts[POLICY], x, outs, slopes, dfeatures, (Matrix){0}, 0, gradients, dz, between,
                 room + this->sums);
    }
}

/* Parameters by the slice, which threads take as they do rows.
 *
 * pieces, stride: of `partial`, whose numbers are added up into the first piece's
 * gradient: [parameters], a copy of it
 * squares: of the gradient, of each slice
 * adam, number, norm: the step along it
 */
typedef struct {
    Work work;
    float *partial, *gradient, *values, squares[PIECES];
    size pieces, stride, number;
    const Adam *adam;
    float norm;
} Slices;

static void cut_slices(Slices *slices, size parameters, size cost, void (*go)(const Work *, size, size, size, float *))
{
    slices->work = (Work){.go = go, .cost = parameters * cost, .soon = 1};
    cut(&slices->work, parameters, LANE, MIN_SLICE, PIECES);
}

/* The gradients of all pieces together, in their order. */
FAST static void go_gather(const Work *work, size slice, size begin, size end, float *Py_UNUSED(room))
{
    Slices *this = (Slices *)work;
    float *sum = this->partial;
    for (size piece = 1; piece < this->pieces; piece++) {
        const float *from = sum + piece * this->stride;
        for (size i = begin; i < end; i++)
            sum[i] += from[i];
    }
    memcpy(this->gradient + begin, sum + begin, sizeof(float) * (size_t)(end - begin));
    vec squares = spread(0);
    size i = begin;
    for (; i + LANE <= end; i += LANE)
        squares += load(sum + i) * load(sum + i);
    float square = total(squares);
    for (; i < end; i++)
        square += sum[i] * sum[i];
    this->squares[slice] = square;
}

static void go_step(const Work *work, size Py_UNUSED(slice), size begin, size end, float *Py_UNUSED(room))
{
    const Slices *this = (const Slices *)work;
    step(this->adam, this->number, this->norm, this->gradient, begin, end, this->values);
}

/* The sum of all pieces' gradients, into `gradient`, and [FIGURES] of them. */
static void gather(const Gradient *this, float *gradient, float *figures, size threads)
{
    Slices slices = {.partial = this->partial, .gradient = gradient, .pieces = this->work.pieces};
    slices.stride = this->parameters + SUMS;
    cut_slices(&slices, this->parameters, slices.pieces * SUM_COST, go_gather);
    do_work(&slices.work, threads);
    float square = 0;
    for (size slice = 0; slice < slices.work.pieces; slice++)
        square += slices.squares[slice];
    for (size sum = this->parameters; sum < slices.stride; sum++) {
        for (size piece = 1; piece < slices.pieces; piece++)
            this->partial[sum] += this->partial[sum + piece * slices.stride];
        figures[sum - this->parameters] = this->partial[sum] * this->loss.each;
    }
    figures[NORM] = sqrtf(square);
}

/* As a minibatch normalises its advantages: mean 0, deviation 1. */
static void normalize(float *at, size count)
{
    double mean = 0, square = 0;
    for (size i = 0; i < count; i++)
        mean += at[i];
    mean /= (double)count;
    for (size i = 0; i < count; i++)
        square += (at[i] - mean) * (at[i] - mean);
    float middle = (float)mean, scale = (float)(1 / (sqrt(square / (double)(count - 1)) + 1e-8));
    for (size i = 0; i < count; i++)
        at[i] = (at[i] - middle) * scale;
}

/* What is the same for all minibatches.
 *
 * given: [N], the advantages as they came
 * advantage: [n], those of the rows in their order, normalised if that is asked for
 * gradient: [parameters], of the newest minibatch
 */
typedef struct {
    const float *given;
    float *advantage, *gradient;
    float entropy, value_coefficient, log_half;
    int normalized;
} Epoch;

/* The gradient of rows order[start] to order[stop - 1], and its figures. */
static void take_gradient(const Gradient *of_all, const Epoch *epoch, size start, size stop, float *figures, size threads)
{
    Gradient this = *of_all;
    size rows = stop - start;
    this.loss.order += start;
    this.loss.log_prob += start;
    this.loss.value += start;
    this.loss.advantage = epoch->advantage + start;
    this.loss.each = 1 / (float)rows;
    this.loss.dentropy = -epoch->entropy * this.loss.each;
    this.loss.dvalue = epoch->value_coefficient * this.loss.each;
    begin_loss(&this.loss, epoch->log_half);
    for (size r = 0; r < rows; r++)
        epoch->advantage[start + r] = epoch->given[this.loss.order[r]];
    if (epoch->normalized && rows > 1)
        normalize(epoch->advantage + start, rows);
    float *to = this.panels;
    for (size l = 0; l < this.parts[PARTS]; l++) {
        to = pack_forth(&this.layers[l], to);
        if (l && (l != this.parts[CRITIC] || this.parts[POLICY]))
            to = pack_back(&this.layers[l], to);
    }
    cut(&this.work, rows, ROWS, TILE, this.most);
    this.work.cost = 3 * rows * this.parameters;
    this.work.soon = 1;
    do_work(&this.work, threads);
    gather(&this, epoch->gradient, figures, threads);
}
