/* suggest.h - what was probably meant by a name that is not known. */
#ifndef DS_SUGGEST_H
#define DS_SUGGEST_H

/* Made with the name that was given; then every name that there is goes through ds_suggest(). */
typedef struct ds_suggestion {
    const char *given;
    const char *best; /* the nearest one so far, as it was handed in; NULL: none is near */
    int edits;
} ds_suggestion;

void ds_suggest(ds_suggestion *s, const char *candidate);

#endif
