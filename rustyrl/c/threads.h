/* Work that is cut into pieces of rows, which threads take as they are free, so that a core that is busy elsewhere holds
 * nobody up. What a piece comes to must not depend on who takes it. */

enum { MAX_THREADS = 64, PIECES = 16, MIN_PIECE = 96 };
enum { WORTH_SHARING = 1 << 22 }; /* products: a tenth of a millisecond of them; to wake somebody up takes a part of it */
enum { PATIENCE = 20000 }; /* a fraction of a millisecond: to sleep for the rest of a piece takes longer than it */

/* rows, rows_each: of all, and of a piece
 * cost: products of all
 * room, room_each: numbers that each thread has for itself
 * next, threads: the piece to be taken next, and how many threads have taken any
 * inside: helpers that are at it
 */
typedef struct Work {
    void (*go)(const struct Work *work, size piece, size begin, size end, float *room);
    size rows, rows_each, pieces, cost;
    float *room;
    size room_each;
    size next, threads, inside;
} Work;

static size least(size a, size b) { return a < b ? a : b; }

/* As many pieces for any number of threads, each of a multiple of so many rows. */
static void cut(Work *work, size rows, size multiple, size most)
{
    work->rows = rows;
    work->rows_each = (rows + most * multiple - 1) / (most * multiple) * multiple;
    if (work->rows_each < MIN_PIECE)
        work->rows_each = MIN_PIECE;
    work->pieces = rows ? (rows + work->rows_each - 1) / work->rows_each : 1;
}

static void take_pieces(Work *work)
{
    size thread = __atomic_fetch_add(&work->threads, 1, __ATOMIC_RELAXED), piece;
    while ((piece = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < work->pieces) {
        size begin = piece * work->rows_each;
        work->go(work, piece, begin, least(begin + work->rows_each, work->rows), work->room + thread * work->room_each);
    }
}

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Threads that sleep until there is work; whoever comes while there is some does his own alone. */
static struct {
    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    Work *work; /* that may be joined */
    size wanted, helpers;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};

static void *help(void *unused)
{
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (!pool.work || !pool.wanted)
            pthread_cond_wait(&pool.wake, &pool.lock);
        Work *work = pool.work;
        pool.wanted--;
        __atomic_add_fetch(&work->inside, 1, __ATOMIC_RELAXED);
        pthread_mutex_unlock(&pool.lock);
        take_pieces(work);
        pthread_mutex_lock(&pool.lock); /* until it is released, whose work it is stays */
        if (!__atomic_sub_fetch(&work->inside, 1, __ATOMIC_RELEASE))
            pthread_cond_broadcast(&pool.done);
    }
    return unused;
}

/* A child process has none of its parent's threads. */
static void forget_threads(void)
{
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.done, NULL);
    pool.work = NULL;
    pool.wanted = pool.helpers = 0;
}

static void do_work(Work *work, size threads)
{
    size helpers = work->cost < WORTH_SHARING ? 0 : least(threads, work->pieces) - 1;
    int ours = 0;
    if (helpers > 0) {
        pthread_mutex_lock(&pool.lock);
        for (pthread_t thread; pool.helpers < helpers; pool.helpers++) {
            if (pthread_create(&thread, NULL, help, NULL))
                break; /* with fewer, then */
            pthread_detach(thread);
        }
        if (!pool.work) {
            ours = 1;
            pool.work = work;
            pool.wanted = least(helpers, pool.helpers);
            pthread_cond_broadcast(&pool.wake);
        }
        pthread_mutex_unlock(&pool.lock);
    }
    take_pieces(work);
    if (ours) {
        pthread_mutex_lock(&pool.lock);
        pool.work = NULL; /* who wakes up late finds nothing to do */
        pthread_mutex_unlock(&pool.lock);
        for (int i = 0; i < PATIENCE && __atomic_load_n(&work->inside, __ATOMIC_ACQUIRE); i++)
            relax();
        pthread_mutex_lock(&pool.lock);
        while (work->inside)
            pthread_cond_wait(&pool.done, &pool.lock);
        pthread_mutex_unlock(&pool.lock);
    }
}
