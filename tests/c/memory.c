/* What the library costs in memory, measured from outside. Linux only.
 *
 *     memory leaks ADAPTER PRESET     opens and closes each 10,000 times
 *     memory sdxl ADAPTER             opens a file of SDXL's size, 3 MB, and computes its values, 13 MB
 */
#include <pthread.h>
#include <stdatomic.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "check.h"

/* kB of a line of /proc/self/status. RssAnon is what no file backs: private memory. */
static long status(const char *key) {
    char line[256];
    long found = -1;
    FILE *file = fopen("/proc/self/status", "r");
    CHECK(file != NULL);
    while (fgets(line, sizeof line, file))
        if (strncmp(line, key, strlen(key)) == 0)
            found = atol(line + strlen(key) + 1);
    fclose(file);
    CHECK(found >= 0);
    return found;
}

static int leaks(const char *adapter_path, const char *preset_path) {
    long before = 0;
    for (int i = 0; i < 10000; ++i) {
        if (i == 1000) /* the allocator and the thread pool have settled */
            before = status("VmRSS");
        VmixAdapter *adapter = NULL;
        VmixValues *values = NULL;
        const char *text = NULL;
        OK(vmix_adapter_open(adapter_path, &adapter));
        OK(vmix_adapter_metadata(adapter, "vmix.base", &text));
        OK(vmix_values_open(preset_path, &values));
        OK(vmix_values_metadata(values, "vmix.base", &text));
        vmix_adapter_free(adapter);
        vmix_values_free(values);
        FAILS(IO, "nowhere", vmix_values_open("nowhere", &values));
    }
    long growth = status("VmRSS") - before;
    printf("9,000 more openings: %+ld kB\n", growth);
    /* A leak of one 64-byte string each would be 576 kB. */
    return growth < 400 ? 0 : 1;
}

static atomic_bool done;
static long peak;

static void *watch(void *unused) {
    (void)unused;
    while (!done) {
        long now = status("RssAnon");
        peak = now > peak ? now : peak;
        usleep(500);
    }
    return NULL;
}

static int sdxl(const char *path) {
    vmix_set_num_threads(4); /* each has buffers of its own, and some machines have hundreds */
    long before = status("RssAnon");
    VmixAdapter *adapter = NULL;
    OK(vmix_adapter_open(path, &adapter));
    long opened = status("RssAnon");
    printf("opening: %ld kB private\n", opened - before);

    pthread_t watcher;
    CHECK(pthread_create(&watcher, NULL, watch, NULL) == 0);
    VmixValues *values = NULL;
    VmixValuesParams params = {.struct_size = sizeof params, .dtype = VMIX_DTYPE_F16};
    OK(vmix_adapter_values(adapter, &params, &values));
    done = 1;
    CHECK(pthread_join(watcher, NULL) == 0);
    printf("values: %ld kB private at the peak, %ld kB kept\n", peak - before,
           status("RssAnon") - opened);
    vmix_values_free(values);
    vmix_adapter_free(adapter);
    return opened - before < 10 * 1024 && peak - before < 24 * 1024 ? 0 : 1;
}

int main(int argc, char **argv) {
    /* By huge pages, which some systems give unasked, memory would grow two megabytes at a time. */
    CHECK(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0);
    if (argc == 4 && strcmp(argv[1], "leaks") == 0)
        return leaks(argv[2], argv[3]);
    if (argc == 3 && strcmp(argv[1], "sdxl") == 0)
        return sdxl(argv[2]);
    return 2;
}
