/* faults.c - all that is wrong with a text, in one message.
 *
 * Who mends a file wants to know of everything at once, and of no more than fits on a screen.
 */
#include "runner/faults.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int ds_faults_full(const ds_faults *faults)
{
    return faults->shown == DS_FAULTS_SHOWN || faults->shown < faults->count;
}

void ds_fault(ds_faults *faults, const char *format, ...)
{
    size_t before = faults->used, room;
    va_list args;
    int n;

    if (ds_faults_full(faults)) {
        faults->count++;
        return;
    }
    faults->count++;
    if (faults->shown)
        faults->text[faults->used++] = '\n';
    room = sizeof faults->text - faults->used;
    va_start(args, format);
    n = vsnprintf(faults->text + faults->used, room, format, args);
    va_end(args);
    if (n >= 0 && (size_t)n + 1 < room) { /* 1: for the next one's line end */
        faults->used += (size_t)n;
        faults->shown++;
    } else if (faults->shown == 0) { /* cut is better than nothing */
        faults->used = strlen(faults->text);
        faults->shown = 1;
    } else {
        faults->used = before;
        faults->text[before] = 0;
    }
}

int ds_faults_fail(const ds_faults *faults, int code, const char *end)
{
    char more[32] = "";

    if (!faults->count)
        return 0;
    if (faults->shown < faults->count)
        snprintf(more, sizeof more, "\nand %d more", faults->count - faults->shown);
    return ds_fail(code, "%s%s%s%s", faults->text, more, end ? "\n" : "", end ? end : "");
}

char *ds_quote(char *out, const char *text, size_t bytes)
{
    static const char end[] = "…";
    size_t used = 0, cut = 0;

    for (size_t i = 0; i < bytes; i++) {
        unsigned char c = (unsigned char)text[i];
        const char *known = c ? strchr("\tt\nn\rr", c) : NULL;
        char piece[8];
        int n;

        if (known && c < 32)
            n = snprintf(piece, sizeof piece, "\\%c", known[1]);
        else
            n = snprintf(piece, sizeof piece, c < 32 || c > 126 ? "\\x%02x" : "%c", c);
        if (used + (size_t)n >= DS_QUOTE) {
            strcpy(out + cut, end);
            return out;
        }
        memcpy(out + used, piece, (size_t)n);
        used += (size_t)n;
        if (used + sizeof end <= DS_QUOTE)
            cut = used;
    }
    out[used] = 0;
    return out;
}
