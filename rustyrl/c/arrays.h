/* Arrays of Python, borrowed through its buffer protocol and looked at before anything is read. */

enum { MAX_BUFFERS = 2 * MAX_LAYERS + 16 };

typedef struct {
    Py_buffer views[MAX_BUFFERS];
    size count;
} Borrowed;

static void give_back(Borrowed *borrowed)
{
    while (borrowed->count)
        PyBuffer_Release(&borrowed->views[--borrowed->count]);
}

static int refuse(const char *message)
{
    PyErr_SetString(PyExc_ValueError, message);
    return -1;
}

enum { STRIDED = 1, WRITABLE = 2, INT32 = 4, BOOL = 8 };

/* The numbers of an array with one or two axes, float32 unless `how` says otherwise; -1 and an exception if it is none.
 * A `rows` or `columns` that is not negative must be met; unless it may be STRIDED the numbers must be side by side. */
static int borrow(Borrowed *borrowed, PyObject *array, const char *name, int axes, size rows, size columns, int how,
                  Matrix *matrix)
{
    Py_buffer *view = &borrowed->views[borrowed->count];
    const char *format = how & INT32 ? "i" : how & BOOL ? "?" : "f";
    size each = how & BOOL ? 1 : 4;
    int flags = how & STRIDED ? PyBUF_STRIDES : PyBUF_C_CONTIGUOUS;
    if (PyObject_GetBuffer(array, view, PyBUF_FORMAT | flags | (how & WRITABLE ? PyBUF_WRITABLE : 0)) < 0)
        return -1;
    borrowed->count++;
    if (view->itemsize != each || !view->format || strcmp(view->format, format)) {
        PyErr_Format(PyExc_TypeError, "%s must hold %s, got format '%s'", name,
                     how & INT32 ? "int32" : how & BOOL ? "bool" : "float32", view->format ? view->format : "B");
        return -1;
    }
    if (view->ndim != axes) {
        PyErr_Format(PyExc_ValueError, "%s must have %d axes, got %d", name, axes, view->ndim);
        return -1;
    }
    size of_rows = axes == 2 ? view->shape[0] : 1, of_columns = view->shape[axes - 1];
    if ((rows >= 0 && of_rows != rows) || (columns >= 0 && of_columns != columns)) {
        PyErr_Format(PyExc_ValueError, "%s must be [%zd, %zd], got [%zd, %zd]", name, rows < 0 ? of_rows : rows,
                     columns < 0 ? of_columns : columns, of_rows, of_columns);
        return -1;
    }
    size row = axes == 2 ? view->strides[0] : 0, column = view->strides[axes - 1];
    if (row % each || column % each) {
        PyErr_Format(PyExc_ValueError, "%s has strides that are no multiple of %zd bytes", name, each);
        return -1;
    }
    *matrix = (Matrix){view->buf, of_rows, of_columns, row / each, column / each};
    return 0;
}

/* An array [count] of numbers side by side. */
static int borrow_numbers(Borrowed *borrowed, PyObject *array, const char *name, size count, int how, float **at)
{
    Matrix matrix;
    if (borrow(borrowed, array, name, 1, -1, count, how, &matrix) < 0)
        return -1;
    *at = matrix.at;
    return 0;
}

static int count_items(PyObject *tuple, const char *name, size expected)
{
    if (!PyTuple_Check(tuple) || (expected >= 0 && PyTuple_Size(tuple) != expected)) {
        PyErr_Format(PyExc_ValueError, "%s must be a tuple with an item for each layer", name);
        return -1;
    }
    return 0;
}
