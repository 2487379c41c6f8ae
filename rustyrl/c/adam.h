/* Adam, as rustyrl_learner/adam.py and torch have it: Kingma and Ba 2015, algorithm 1, with decay apart from it. */

/* first, second: moments, [parameters]
 * kept: parameters at the start that do not decay
 * steps: that were taken before the first of these
 * largest_norm: to which a gradient is scaled down
 */
typedef struct {
    float *first, *second;
    double rate, beta1, beta2, epsilon, decay, largest_norm;
    size kept, steps;
} Adam;

/* The step number `number` of these, counted from 1, along a gradient of this norm, of parameters from begin to end. */
FAST static void step(const Adam *adam, size number, float norm, const float *restrict gradient, size begin, size end,
                      float *restrict parameters)
{
    double steps = (double)(adam->steps + number), scale = adam->largest_norm / (norm + 1e-6);
    const float by = scale < 1 ? (float)scale : 1, epsilon = (float)adam->epsilon;
    const float new_first = (float)(1 - adam->beta1), new_second = (float)(1 - adam->beta2);
    const float rate = (float)(adam->rate / (1 - pow(adam->beta1, steps)));
    const float root = (float)(1 / sqrt(1 - pow(adam->beta2, steps))), decay = (float)(adam->rate * adam->decay);
    float *restrict first = adam->first, *restrict second = adam->second;
    for (size i = adam->kept > begin ? adam->kept : begin; decay != 0 && i < end; i++)
        parameters[i] -= parameters[i] * decay;
    for (size i = begin; i < end; i++) {
        float g = gradient[i] * by;
        first[i] += (g - first[i]) * new_first;
        second[i] += (g * g - second[i]) * new_second;
        parameters[i] -= rate * first[i] / (sqrtf(second[i]) * root + epsilon);
    }
}
