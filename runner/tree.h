/* tree.h - the files of a folder, as a list: what is copied to other hosts, or compared with theirs.
 *
 * Left out are hidden files and folders (.git, .venv), folders with what a build or a run has made
 * (build, build-*, out), and what is neither a file nor a link.
 */
#ifndef DS_TREE_H
#define DS_TREE_H

#include <stdint.h>
#include <stdio.h>

#define DS_TREE_HASH 33 /* bytes of a hash as text */

typedef struct ds_tree_file {
    char *name;    /* from the folder on: "models/gpt.lua" */
    int64_t bytes; /* of a link: of what it says */
    char kind;     /* 'f' a file, 'x' a program, 'l' a link */
} ds_tree_file;

typedef struct ds_tree {
    char *folder;
    ds_tree_file *file; /* [count], in the order of their names' bytes */
    int count, room;
    int64_t bytes; /* of all files */
    int follow;    /* links stand for what they point to */
} ds_tree;

/* follow 1: links are files and folders; 0: they are links. *out is to be freed with ds_tree_free(),
 * also after an error. */
int ds_tree_read(ds_tree *out, const char *folder, int follow);
void ds_tree_free(ds_tree *t);

/* Of all names, kinds and contents: the same for equal folders on any host. hash: [DS_TREE_HASH] */
int ds_tree_hash(char *hash, const ds_tree *t);
/* Of one file's content. */
int ds_tree_hash_file(char *hash, const char *path);

/* A tar file, in memory that is freed with ds_tree_drop(). It is made by tar(1), and holds no
 * times, owners or empty folders. */
int ds_tree_pack(char **tar, size_t *bytes, const ds_tree *t);
void ds_tree_drop(char *tar, size_t bytes);

/* "1.5 GiB (data 1.4 GiB, old.bin 90 MiB)": in all, and of the largest of what is directly in it. */
void ds_tree_sizes(FILE *to, const ds_tree *t);

#endif
