/* suggest.c - "did you mean": the nearest of some names. */
#include "runner/suggest.h"

#include <ctype.h>
#include <string.h>

#define MAX_NAME 48 /* nobody wants a guess at a longer one */

static int same(char a, char b)
{
    return tolower((unsigned char)a) == tolower((unsigned char)b);
}

/* Edits that turn a into b: letters put in, left out, exchanged, or two neighbours swapped. */
static int distance(const char *a, const char *b)
{
    int n = (int)strlen(a), m = (int)strlen(b);
    int d[MAX_NAME + 1][MAX_NAME + 1];

    for (int i = 0; i <= n; i++) {
        for (int j = 0; j <= m; j++) {
            int best;
            if (i == 0 || j == 0) {
                d[i][j] = i + j;
                continue;
            }
            best = d[i - 1][j - 1] + !same(a[i - 1], b[j - 1]);
            if (d[i - 1][j] + 1 < best)
                best = d[i - 1][j] + 1;
            if (d[i][j - 1] + 1 < best)
                best = d[i][j - 1] + 1;
            if (i > 1 && j > 1 && same(a[i - 1], b[j - 2]) && same(a[i - 2], b[j - 1]) &&
                d[i - 2][j - 2] + 1 < best)
                best = d[i - 2][j - 2] + 1;
            d[i][j] = best;
        }
    }
    return d[n][m];
}

void ds_suggest(ds_suggestion *s, const char *candidate)
{
    size_t length = strlen(s->given);
    int edits, limit = s->best ? s->edits : 2 + (int)length / 4;

    if (length > MAX_NAME || strlen(candidate) > MAX_NAME)
        return;
    edits = distance(s->given, candidate);
    if (edits < limit) {
        s->best = candidate;
        s->edits = edits;
    }
}
