/* Layers of perceptrons, forth and back, for a tile of rows: bias, product and activation of one layer, then of the next.
 *
 * What BLAS and an array library do layer by layer, over memory that a core has to fetch again for every operation, is
 * done here for few rows at a time, so that what is between the layers stays in the cache. Products run at the speed of
 * the core's multipliers; what stands around them costs next to nothing.
 */

enum { PANEL = 16, ROWS = 6, TILE = 48 }; /* ROWS x PANEL numbers are summed up in registers */
enum { IDENTITY, RELU, TANH, ELU, SILU, ACTIVATIONS };

/* Numbers that are not side by side: that of row r and column c is at[r * row + c * column]. */
typedef struct {
    float *at;
    size rows, columns, row, column;
} Matrix;

typedef struct {
    size in, out;
    int activation;
    const float *weight, *bias; /* [in, out], [out] */
    float *forth; /* the weight in panels, with its bias before each */
    float *back;  /* the transposed weight in panels, or NULL where nobody asks for the gradient of what came in */
    size dweight, dbias; /* where their gradients are among those of all parameters */
} Layer;

INLINE vec activate(vec z, int activation)
{
    if (activation == TANH)
        return hyperbolic_tangent(z);
    if (activation == RELU)
        return choose(z < spread(0), spread(0), z);
    if (activation == ELU)
        return choose(z > spread(0), z, exponential_less_one(z));
    if (activation == SILU)
        return z / (1 + exponential(-z));
    return z;
}

/* How much of a gradient passes an activation that left y; of SILU, whose slope y does not tell, y is the slope. */
INLINE vec pass(vec gradient, vec y, int activation)
{
    if (activation == TANH)
        return gradient * (1 - y * y);
    if (activation == RELU)
        return choose(y > spread(0), gradient, spread(0));
    if (activation == ELU)
        return choose(y > spread(0), gradient, gradient * (y + 1));
    if (activation == SILU)
        return gradient * y;
    return gradient;
}

/* Up to 6 rows and 16 columns of activation(start + a b), or of out + a b.
 *
 * a: [rows, depth]
 * panel: [depth, 16], rows `stride` apart; columns that `width` leaves out are read but not used
 * start: [16], or NULL for 0
 */
INLINE void block(int rows, int vectors, Matrix a, size depth, const float *panel, size stride, const float *start,
                  int activation, int add, Matrix out, int width)
{
    vec sum[ROWS][2];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            sum[r][v] = start ? load(start + v * LANE) : spread(0);
    for (size k = 0; k < depth; k++) {
        vec b[2];
        UNROLL for (int v = 0; v < vectors; v++)
            b[v] = load(panel + k * stride + v * LANE);
        UNROLL for (int r = 0; r < rows; r++) {
            vec x = spread(a.at[r * a.row + k * a.column]);
            UNROLL for (int v = 0; v < vectors; v++)
                sum[r][v] += x * b[v];
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            sum[r][v] = activate(sum[r][v], activation);
    if (out.column == 1 && width == vectors * LANE) {
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < vectors; v++) {
                float *to = out.at + r * out.row + v * LANE;
                if (add)
                    sum[r][v] += load(to);
                store(to, sum[r][v]);
            }
        return;
    }
    UNROLL for (int r = 0; r < rows; r++) {
        float narrow[PANEL], *to = out.at + r * out.row;
        UNROLL for (int v = 0; v < vectors; v++)
            store(narrow + v * LANE, sum[r][v]);
        for (int i = 0; i < width; i++)
            to[i * out.column] = narrow[i] + (add ? to[i * out.column] : 0);
    }
}

/* All rows of a block of columns: a copy of `block` for each number of rows, whose sums then are registers. */
#define BLOCK(rows, vectors, activation) block(rows, vectors, a, depth, panel, stride, start, activation, add, out, width)
#define COLUMN_OF(vectors, activation)                                                                                 \
    for (; a.rows >= ROWS; a.rows -= ROWS, a.at += ROWS * a.row, out.at += ROWS * out.row)                             \
        BLOCK(ROWS, vectors, activation);                                                                              \
    switch (a.rows) {                                                                                                  \
    case 5: BLOCK(5, vectors, activation); break;                                                                      \
    case 4: BLOCK(4, vectors, activation); break;                                                                      \
    case 3: BLOCK(3, vectors, activation); break;                                                                      \
    case 2: BLOCK(2, vectors, activation); break;                                                                      \
    case 1: BLOCK(1, vectors, activation); break;                                                                      \
    }
#define COLUMN(name, activation)                                                                                       \
    FAST static void name(Matrix a, const float *panel, size stride, const float *start, int add, Matrix out,          \
                          int width)                                                                                   \
    {                                                                                                                  \
        size depth = a.columns;                                                                                        \
        if (width > LANE) {                                                                                            \
            COLUMN_OF(2, activation)                                                                                   \
        } else {                                                                                                       \
            COLUMN_OF(1, activation)                                                                                   \
        }                                                                                                              \
    }
COLUMN(column_identity, IDENTITY)
COLUMN(column_relu, RELU)
COLUMN(column_tanh, TANH)
COLUMN(column_elu, ELU)
COLUMN(column_silu, SILU)

static size padded(size width) { return (width + PANEL - 1) / PANEL * PANEL; }

static Matrix rows_from(Matrix m, size first, size rows)
{
    m.at += first * m.row;
    m.rows = rows;
    return m;
}

static Matrix transposed(Matrix m) { return (Matrix){m.at, m.columns, m.rows, m.column, m.row}; }

/* out = activation(a weight + bias), or out + a weight, of panels that `pack` made. */
FAST static void through(Matrix a, const float *panels, int biased, int activation, int add, Matrix out)
{
    static void (*const columns_of[ACTIVATIONS])(Matrix, const float *, size, const float *, int, Matrix, int) = {
        column_identity, column_relu, column_tanh, column_elu, column_silu};
    void (*column)(Matrix, const float *, size, const float *, int, Matrix, int) = columns_of[activation];
    size columns = out.columns;
    for (size j = 0; j < columns; j += PANEL) {
        column(a, panels + (biased ? PANEL : 0), PANEL, biased ? panels : NULL, add, out, (int)least(PANEL, columns - j));
        panels += PANEL * (a.columns + (biased ? 1 : 0));
        out.at += PANEL * out.column;
    }
}

/* [depth, width] as panels of 16 columns, each with its bias first if there is one; 0 beyond the width. */
static float *pack(float *to, Matrix from, const float *bias)
{
    for (size j = 0; j < from.columns; j += PANEL) {
        size width = least(PANEL, from.columns - j);
        memset(to, 0, sizeof(float) * PANEL * (from.rows + (bias ? 1 : 0)));
        if (bias) {
            memcpy(to, bias + j, sizeof(float) * width);
            to += PANEL;
        }
        for (size k = 0; k < from.rows; k++, to += PANEL) {
            const float *row = from.at + k * from.row + j * from.column;
            if (from.column == 1 && width == PANEL)
                memcpy(to, row, sizeof(float) * PANEL);
            else
                for (size i = 0; i < width; i++)
                    to[i] = row[i * from.column];
        }
    }
    return to;
}

/* dz = what of dy passes the activation, [rows, padded], and its sums over rows, added up. */
INLINE void take_in_of(Matrix dy, const float *y, int activation, float *dz, float *sums)
{
    size width = dy.columns, stride = padded(width);
    for (size r = 0; r < dy.rows; r++, dz += stride) {
        const float *from = dy.at + r * dy.row, *kept = y + r * width;
        size i = 0;
        if (dy.column == 1)
            for (; i + LANE <= width; i += LANE) {
                vec g = pass(load(from + i), activation == IDENTITY ? spread(0) : load(kept + i), activation);
                store(dz + i, g);
                store(sums + i, load(sums + i) + g);
            }
        for (; i < width; i++) {
            float kept_here = activation == IDENTITY ? 0 : kept[i];
            dz[i] = pass(spread(from[i * dy.column]), spread(kept_here), activation)[0];
            sums[i] += dz[i];
        }
    }
}

FAST static void take_in(Matrix dy, const float *y, int activation, float *dz, float *sums)
{
    switch (activation) {
    case IDENTITY: take_in_of(dy, y, IDENTITY, dz, sums); break;
    case RELU: take_in_of(dy, y, RELU, dz, sums); break;
    case TANH: take_in_of(dy, y, TANH, dz, sums); break;
    case ELU: take_in_of(dy, y, ELU, dz, sums); break;
    case SILU: take_in_of(dy, y, SILU, dz, sums); break;
    }
}

/* Bring the weights into panels, each layer's for its way forth, and for its way back where that is asked for.
 * Returns the end of what they take of `to`. */
static float *pack_forth(Layer *layer, float *to)
{
    layer->forth = to;
    return pack(to, (Matrix){(float *)layer->weight, layer->in, layer->out, layer->out, 1}, layer->bias);
}

static float *pack_back(Layer *layer, float *to)
{
    layer->back = to;
    return pack(to, (Matrix){(float *)layer->weight, layer->out, layer->in, 1, layer->out}, NULL);
}

static size forth_numbers(const Layer *layer) { return (layer->in + 1) * padded(layer->out); }
static size back_numbers(const Layer *layer) { return layer->out * padded(layer->in); }

/* out = SILU(z), and z becomes its slope there. */
FAST static void silu_with_slope(Matrix out, float *z)
{
    size count = out.rows * out.columns;
    for (size i = 0; i < count; i += LANE) { /* a whole tile is a multiple of 8, so all of it is room for the tile */
        vec x = load(z + i), gate = 1 / (1 + exponential(-x));
        store(out.at + i, x * gate);
        store(z + i, gate * (1 + x * (1 - gate)));
    }
}

/* What layers say of a tile, each written to its out, and where there is room for it the slope of its activation. */
FAST static Matrix run_forth(const Layer *layers, size count, Matrix a, const Matrix *outs, float *const *slopes)
{
    for (size l = 0; l < count; l++) {
        Matrix out = outs[l];
        out.rows = a.rows;
        if (slopes && slopes[l]) {
            Matrix z = out;
            z.at = slopes[l];
            through(a, layers[l].forth, 1, IDENTITY, 0, z);
            silu_with_slope(out, slopes[l]);
        } else
            through(a, layers[l].forth, 1, layers[l].activation, 0, out);
        a = out;
    }
    return a;
}

/* The gradients of layers for that of what came out of the last, dy, added to what stands in `gradients`.
 *
 * a: what went into the first
 * outs, slopes: as of `run_forth`; of layers with an activation contiguous
 * dx: the gradient of a is written there, or added to it; or its at is NULL
 * dz: [TILE, widest, padded], of which what pads it holds numbers
 * between: [TILE, widest] each
 * sums: [widest, padded]
 */
FAST static void run_back(const Layer *layers, size count, Matrix a, const Matrix *outs, float *const *slopes, Matrix dy,
                          Matrix dx, int add, float *gradients, float *dz, float *const between[2], float *sums)
{
    for (size l = count - 1; l >= 0; l--) {
        const Layer *layer = &layers[l];
        float *dweight = gradients + layer->dweight, *dbias = gradients + layer->dbias;
        size stride = padded(layer->out);
        memset(sums, 0, sizeof(float) * stride);
        take_in(dy, slopes[l] ? slopes[l] : outs[l].at, layer->activation, dz, sums);
        for (size i = 0; i < layer->out; i++)
            dbias[i] += sums[i];
        Matrix in = transposed(l ? rows_from(outs[l - 1], 0, a.rows) : a);
        for (size j = 0; j < layer->out; j += PANEL) {
            Matrix columns = {dweight + j, layer->in, layer->out - j, layer->out, 1};
            column_identity(in, dz + j, stride, NULL, 1, columns, (int)least(PANEL, layer->out - j));
        }
        if (l || dx.at) {
            Matrix before = l ? (Matrix){between[l % 2], a.rows, layer->in, layer->in, 1} : dx;
            before.rows = a.rows;
            through((Matrix){dz, a.rows, layer->out, stride, 1}, layer->back, 0, IDENTITY, !l && add, before);
            dy = before;
        }
    }
}
