/* What the test programs share: checks that say where they failed. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vmix.h"

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: %s is false; last error: %s\n", __FILE__,       \
                    __LINE__, #condition, vmix_last_error());                       \
            exit(1);                                                                \
        }                                                                           \
    } while (0)

#define OK(call) CHECK((call) == VMIX_STATUS_OK)

/* The call fails with this status, and its message contains these words. */
#define FAILS(status, words, call)                                                  \
    do {                                                                            \
        CHECK((call) == VMIX_STATUS_##status);                                      \
        if (strstr(vmix_last_error(), (words)) == NULL) {                           \
            fprintf(stderr, "%s:%d: %s says: %s\n", __FILE__, __LINE__, #call,      \
                    vmix_last_error());                                             \
            exit(1);                                                                \
        }                                                                           \
    } while (0)

/* A whole file in memory; the caller frees it. */
static inline unsigned char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    CHECK(file != NULL);
    CHECK(fseek(file, 0, SEEK_END) == 0);
    long end = ftell(file);
    CHECK(end > 0);
    rewind(file);
    unsigned char *data = malloc((size_t)end);
    CHECK(data != NULL && fread(data, 1, (size_t)end, file) == (size_t)end);
    fclose(file);
    *size = (size_t)end;
    return data;
}

#endif
